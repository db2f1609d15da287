"""How many images per second the loader and the model would do on this machine: `python -m pipeline.loading.probe`.

A config and a plan come as JSON on standard input; figures and warnings, as notes, go out as JSON. Its own process,
because commands that plan do not load torch; to be started in the environment of a rank, whose threads it measures.
"""

import json
import logging
import os
import sys
import time

import torch

from pipeline.config.plan import BatchPlan
from pipeline.config.stages import STAGES
from pipeline.errors import EXIT_FAILED, EXIT_FAULT, EXIT_INPUT, DataError, FaultError, InputError
from pipeline.loading.loader import Loader
from pipeline.loading.sources import open_sources
from pipeline.loading.stream import SampleStream

SECONDS = 2.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EFFICIENCY = 0.5  # share of a plain matrix product's speed that a training step reaches


def probe(config, plan: dict) -> dict[str, float | None]:
    """Images per second over all ranks of a node: of the loader, and about what the model can take.

    The model's is None where the plan is for accelerators and there is none here.
    """
    return {"loader_images_per_second": loader_speed(config, plan), "model_images_per_second": model_speed(plan)}


def loader_speed(config, plan: dict) -> float:
    """What the planned workers give here: those of one rank are run for some seconds, at most one per core.

    Ranks share the cores: no more workers count than there are cores.
    """
    batches, cores = BatchPlan(**plan["batches"]), os.cpu_count() or 1
    processes = plan["ranks_per_node"] * max(1, plan["loader_workers"])
    workers = min(plan["loader_workers"], cores)
    steps = plan["steps"]["steps"]
    with Loader(
        SampleStream(config, open_sources(config.data).indexes), batches, rank=0, first_step=0, last_step=steps,
        workers=workers, ranks_per_node=plan["ranks_per_node"],
    ) as loader:  # fmt: skip
        next(loader)  # opens the first shards
        started, images = time.perf_counter(), 0
        for raw in loader:
            images += len(raw.keys)
            if (seconds := time.perf_counter() - started) > SECONDS:
                break
        else:
            seconds = time.perf_counter() - started
    speed = images / seconds if images else loader.images_per_second  # a run of one batch
    return speed * min(processes, cores) / max(1, workers)


def model_speed(plan: dict) -> float | None:
    """From one rank's timed matrix product, in the plan's precision; ranks without accelerators share the cores."""
    cuda, ranks = plan["accelerators_per_node"] > 0, plan["ranks_per_node"]
    if cuda and not torch.cuda.is_available():
        return None
    size = 8192 if cuda else 1024
    matrix = torch.randn(size, size, dtype=DTYPES[plan["precision"]], device="cuda" if cuda else "cpu")
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        matrix @ matrix
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    at_once = ranks if cuda else min(ranks, max(1, (os.cpu_count() or 1) // torch.get_num_threads()))
    return at_once * EFFICIENCY * 2 * size**3 / min(seconds) / plan["training_flops_per_image"]


def _noted_warnings() -> list[str]:
    """A list that every warning of ours will be added to."""
    notes: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append(record.getMessage())
    logging.getLogger("pipeline").addHandler(handler)
    return notes


def _said(error: Exception, code: int) -> int:
    sys.stderr.write(f"{error}\n")
    return code


if __name__ == "__main__":
    request, notes = json.load(sys.stdin), _noted_warnings()
    try:
        figures = probe(STAGES[request["config"]["stage"]].model_validate(request["config"]), request["plan"])
        print(json.dumps(figures | {"notes": notes}))
    except InputError as error:
        sys.exit(_said(error, EXIT_INPUT))
    except DataError as error:
        sys.exit(_said(error, EXIT_FAILED))
    except FaultError as error:
        sys.exit(_said(error, EXIT_FAULT))

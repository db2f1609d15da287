"""What our training step adds to a bare PyTorch loop, and to DeepSpeed's own engine, in milliseconds of CPU time.

The loops of `training_loops`, one thread each. Ours is the product's own loop with its ledger, log and meters; the
peers keep no record. Two processes that run the same code differ by half a millisecond and more, so each loop is held
against bare steps of its own process, on the very network, optimizer and clipping, made between the loop's own, a few
at a time: what differs is the loop. (What a loop does some times a second, as ours writes its ledger, so weighs twice.)
Also the difference varies with the process, by some 0.05 ms, so every round begins new ones.
Goals hold for one process. The collective in which the ranks agree on loss, flags and sums has a row of its own: wall
time over gloo, two ranks in step.
About 8 minutes:

    uv run python -m tests.benchmarks.step_overhead
"""

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.contestant import Contestant, ContestantError, Round
from tests.benchmarks.environments import interpreter
from tests.benchmarks.report import Figure, Goal, main, table, verdict
from tests.benchmarks.training_loops import BATCH_SIZE
from tests.ranks import run_on_ranks

LOOPS = {  # name: (loop and stage, what it is held against)
    "ours, without ZeRO": ("ours-0", "bare PyTorch"),
    "accelerate": ("accelerate-0", "bare PyTorch"),
    "Hugging Face Trainer": ("trainer-0", "bare PyTorch"),
    "ours, ZeRO-1": ("ours-1", "DeepSpeed's engine"),
    "ours, ZeRO-2": ("ours-2", "DeepSpeed's engine"),
}
GOALS = {"ours, without ZeRO": 0.3, "ours, ZeRO-1": 0.2, "ours, ZeRO-2": 0.2}  # milliseconds
PEERS = ("accelerate", "Hugging Face Trainer")
WARM_STEPS, TURN_STEPS = 50, 50
AGREED_VALUES = 8  # loss, two flags, the objective's sums and the damage counts

Rounds = dict[str, list[Round]]


def step_overhead(rounds: int = 9, steps: int = 400, collectives: int = 500) -> tuple[str, dict[str, Any]]:
    measured, missing = measure(rounds, steps)
    if lost := [name for name in GOALS if name in missing]:
        raise ContestantError("; ".join(f"{name}: {missing[name]}" for name in lost))
    added = {name: added_milliseconds(taken) for name, taken in measured.items()}
    goals = {
        f"{name}, ms over {LOOPS[name][1]}": Goal(added[name].median, bound, at_least=False)
        for name, bound in GOALS.items()
    }
    rows = [
        [name, milliseconds([one.cpu_seconds for one in taken]).text(3), LOOPS[name][1],
         milliseconds([one.bare_cpu_seconds for one in taken]).text(3), added[name].text(3)]
        for name, taken in measured.items()
    ]  # fmt: skip
    title = f"One step of a ViT of 55 tensors, {BATCH_SIZE} images of 32 pixels, one process"
    text = table(title, ["loop", "ms CPU per step", "against", "its ms CPU", "ms added"], rows)
    text += "".join(f"{name}: not measured: {reason}\n" for name, reason in missing.items())
    collective = Figure.of(run_on_ranks(agreement_milliseconds, 2, collectives)[0])
    text += f"Agreement of two ranks over gloo: {collective.text(3)} ms, wall time\n\n"
    text += "\n".join(goal.line(name) for name, goal in goals.items())
    best = min((name for name in PEERS if name in added), key=lambda name: added[name].median, default=None)
    ours = added["ours, without ZeRO"].median
    result = verdict(
        "step_overhead", goals, ratio=round(ours / added[best].median, 3) if best else None, best_peer=best,
        goal=GOALS["ours, without ZeRO"], agreement_milliseconds=round(collective.median, 3), missing=missing,
        milliseconds_added={name: round(one.median, 3) for name, one in added.items()},
    )  # fmt: skip
    return text, result


def measure(rounds: int, steps: int) -> tuple[Rounds, dict[str, str]]:
    """What every loop that runs took in every round, and why the others do not run."""
    measured, missing = {}, {}
    for _ in range(rounds):
        with TemporaryDirectory() as workspace, ExitStack() as stack:
            names = [name for name in LOOPS if name not in missing]
            running = {name: stack.enter_context(started(LOOPS[name][0], Path(workspace))) for name in names}
            for name, contestant in list(running.items()):
                try:
                    contestant.run(WARM_STEPS * BATCH_SIZE)
                except ContestantError as error:
                    missing[name] = str(error)
                    del running[name]
            for name, contestant in running.items():
                measured.setdefault(name, []).append(one_round(contestant, max(1, steps // TURN_STEPS)))
    return measured, missing


def started(loop: str, workspace: Path) -> Contestant:
    return Contestant(interpreter(()), loop, workspace, program="tests.benchmarks.training_loops")


def one_round(contestant: Contestant, turns: int) -> Round:
    """The medians of turns: what else the machine does for a moment falls on one of them."""
    taken = [contestant.run(TURN_STEPS * BATCH_SIZE) for _ in range(turns)]
    wall, bare = (statistics.median(column) for column in list(zip(*taken, strict=True))[1:])
    return Round(bare + statistics.median(one.cpu_seconds - one.bare_cpu_seconds for one in taken), wall, bare)


def milliseconds(seconds: list[float]) -> Figure:
    """Of a step, from seconds per image."""
    return Figure.of([1000 * BATCH_SIZE * one for one in seconds])


def added_milliseconds(taken: list[Round]) -> Figure:
    """Milliseconds per step beyond those of the bare step, paired by round."""
    return milliseconds([one.cpu_seconds - one.bare_cpu_seconds for one in taken])


def agreement_milliseconds(collectives: int) -> list[float]:
    """On every rank: milliseconds of each all-reduce of the few numbers that a step agrees on."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    taken = []
    for _ in range(collectives):
        values = torch.zeros(AGREED_VALUES, dtype=torch.float64)
        began = time.perf_counter()
        dist.all_reduce(values)
        taken.append(1000 * (time.perf_counter() - began))
    return taken[collectives // 10 :]


if __name__ == "__main__":
    main(step_overhead, "step_overhead", ("torch", "deepspeed", "accelerate", "transformers"))

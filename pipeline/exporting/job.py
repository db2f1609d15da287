"""One export: written beside its destination, opened as anybody would, judged, and published or thrown away."""

import logging
import os
import platform
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pipeline.config.export import ExportConfig
from pipeline.config.stages import read_run_config
from pipeline.errors import RefusedError
from pipeline.exporting.expressible import instead_of_tracing
from pipeline.exporting.folder import LOCK, partial_folder, publish
from pipeline.exporting.formats import how_to_open, preprocessing, write_format
from pipeline.exporting.graphs import UntraceableError
from pipeline.exporting.measuring import command_of_export, command_of_source, figures, opened, outputs
from pipeline.exporting.parity import Answer, Parity, answer_of, compared, out_of_bounds, unjudgeable
from pipeline.exporting.sample import FixedSample, fixed_sample
from pipeline.rank import Rank
from pipeline.registry.integrity import files_in, sha256_of
from pipeline.registry.locate import ModelSource, source_from_dict
from pipeline.registry.weights import load_model
from pipeline.run_directory import write_json

log = logging.getLogger(__name__)
PACKAGES = ("torch", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "safetensors", "numpy")
ROOM = 3  # times the weights: the graph before its weights are rounded, and the files


def export(me: Rank) -> None:
    """Write the export of the config, judge it and publish it; `result.json` and `parity.json` in the run directory.

    RefusedError, and nothing at the destination, where it is out of its bounds.
    """
    config, plan = read_run_config(me.run.path), me.run.plan()
    source, destination = source_from_dict(plan["source"]), Path(config.destination)
    me.phase = "load the model"
    network = load_model(source)
    sample = fixed_sample(source, plan["data"], asked=config.data is not None, count=config.images)
    weights = weight_bytes(network)
    with partial_folder(destination, ROOM * weights) as partial:
        me.phase = f"write {config.format}"
        _tell(me, f"writing {config.format}")
        try:
            notes = write_format(network, source, config, partial)
        except UntraceableError as error:
            said = f"torch's exporter cannot follow this network{_merging(config)}: {error}"
            raise RefusedError(f"format {config.format}: {said}; {instead_of_tracing(source, config)}") from None
        del network
        me.phase = "hold against the source"
        _tell(me, f"opening it in a process of its own, beside the source; {sample.words}")
        answer = answer_of(source.num_classes, source.outputs)
        rows, reason = _judged(me, config, sample, partial, weights, answer)
        report = _report(config, source, sample, rows, notes, partial)
        write_json(me.run.path / "parity.json", report | {"refused": reason})
        if reason is not None:
            raise RefusedError(f"{config.format} export refused: {reason}; nothing was written")
        write_json(partial / "export.json", report)
        publish(partial, destination)
    write_json(me.run.result_file, {"stage": "export", "destination": str(destination)} | report)


def _merging(config: ExportConfig) -> str:
    return "" if config.token_reduction is None else " with merged tokens"


def _tell(me: Rank, words: str) -> None:
    with open(me.attempt.events, "a") as events:
        events.write(words + "\n")


def weight_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _judged(
    me: Rank, config: ExportConfig, sample: FixedSample, folder: Path, weights: int, answer: Answer
) -> tuple[list[dict[str, Any]], str | None]:
    """The table's rows, of the source and of the export, and why the export is refused, if it is."""
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=me.attempt.path) as name:
        scratch = Path(name)
        np.save(scratch / "images.npy", sample.images)
        commands = command_of_source(me.run.path, threads), command_of_export(config.format, folder, threads)
        with opened("source", commands[0], scratch) as ours, opened(config.format, commands[1], scratch) as theirs:
            measured = figures([ours, theirs], sample.images, config.repeats, scratch)
            before, after = (outputs(model, scratch / "images.npy", scratch) for model in (ours, theirs))
    if reason := unjudgeable(before, answer):
        raise RefusedError(f"{config.format} export refused: {reason}")
    comparable = before.shape == after.shape and np.isfinite(after).all()
    parity = compared(before, after, sample.labels, answer) if comparable else None
    size = sum((folder / file).stat().st_size for file in files_in(folder))
    rows = [
        {"format": "source", "bytes": weights, "accuracy": parity and parity.source_accuracy} | measured[0],
        {"format": config.format, "bytes": size, **_lost(parity)} | measured[1],
    ]
    return rows, out_of_bounds(before, after, parity, config.bounds)


def _lost(parity: Parity | None) -> dict[str, Any]:
    if parity is None:
        return {"max_difference": None, "agreement": None, "accuracy": None}
    return {
        "max_difference": parity.max_difference, "largest_output": parity.largest,
        "spread_of_outputs": parity.spread, "agreement": parity.agreement, "accuracy": parity.accuracy,
    }  # fmt: skip


def _report(
    config: ExportConfig, source: ModelSource, sample: FixedSample, rows: list[dict[str, Any]], notes: Sequence[str],
    folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """What DEST/export.json says."""
    lineage = source.lineage
    files = [name for name in files_in(folder) if name != LOCK]
    return {
        "format_version": 1,
        "format": config.format,
        "source": {"model": source.reference} | {key: lineage.get(key) for key in ("registered", "run", "step")},
        "files": {
            name: {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size} for name in files
        },
        "open": how_to_open(config.format, folder),
        "outputs": ("logits; probabilities by " + source.outputs) if source.num_classes else "features",
        "classes": list(source.classes),
        "preprocessing": preprocessing(source),
        "token_reduction": config.token_reduction and config.token_reduction.model_dump(),
        "sample": {
            "words": sample.words, "images": len(sample.images), "dataset": sample.dataset, "accuracy": sample.measure,
        },
        "bounds": config.bounds.model_dump(),
        "table": rows,
        "measured_on": {
            "processor": _processor(), "threads": len(os.sched_getaffinity(0)), "batches": "images of the sample",
            "memory": "peak of a process that opens the model and computes the batches, libraries included",
        },
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "notes": list(notes),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""What finished evaluations say of a checkpoint, and the part of it that a version keeps for the next gate.

A version carries `gate/HASH/evidence.json` and, beside it, the predictions that a paired test needs: the comparison
then needs neither the run directories nor the machine that made them. The tag `vit.gate_evidence_sha256` holds the hash
of evidence.json, which holds those of the predictions. Torch-free.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from pipeline.errors import InputError
from pipeline.registry.gate import SELECTION, Predictions, Standing
from pipeline.registry.integrity import sha256_of
from pipeline.registry.locate import same_checkpoint
from pipeline.registry.test_reads import read_key
from pipeline.run_directory import RunDirectory, read_json, write_json

GATE = "gate"  # the folder in a version's artifacts
EVIDENCE = "evidence.json"
PAIRED = "top1"  # the metric that is the mean of the predictions' `correct`
DECIDING = (PAIRED, "map", "mean_iou")  # the metrics that the gate compares, of each protocol the first that it has


@dataclass
class Evidence:
    """All that evaluations say of one checkpoint. Of a score that was taken twice the newest counts."""

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    scored: dict[str, dict[str, Any]] = field(default_factory=dict)
    standings: list[Standing] = field(default_factory=list)  # newest evaluation first, then in its own order
    files: dict[tuple[str, str, str], Path] = field(default_factory=dict)  # predictions by metric, data and split
    test_reads: dict[str, int] = field(default_factory=dict)


def evidence_for(lineage: dict[str, Any], evaluations: Iterable[str]) -> Evidence:
    """What these evaluations (run directories, newest first) say of the checkpoint of this lineage."""
    found = Evidence()
    for path in evaluations:
        run = RunDirectory(path)
        result = read_json(run.result_file)
        if result is None:
            raise InputError(f"{path}: this evaluation is not finished; it has no {run.result_file.name}")
        for model, scored in run.plan()["sources"].items():
            if model in result["metrics"] and same_checkpoint(scored["lineage"], lineage):
                _add(found, run, result, model)
    return found


def _add(found: Evidence, run: RunDirectory, result: dict[str, Any], model: str) -> None:
    metrics = result["metrics"][model]
    for column in dict.fromkeys(key.rpartition("/")[0] for key in metrics):
        _, protocol, dataset = column.split("/")
        about = _dataset(result, dataset)
        if about["split"] == "test":
            read = read_key(protocol, dataset, about["fingerprint"])
            found.test_reads[read] = found.test_reads.get(read, 0) + 1
        _stand(found, run, result, model, column)
        found.scored.setdefault(dataset, about)
    intervals = result.get("intervals", {}).get(model, {})
    for key in [key for key in metrics if key not in found.metrics]:
        found.metrics[key] = metrics[key]
        if key in intervals:
            found.intervals[key] = tuple(intervals[key])


def _stand(found: Evidence, run: RunDirectory, result: dict[str, Any], model: str, column: str) -> None:
    """Add what the gate compares of a protocol on a split, unless a newer evaluation of the same data said it."""
    metrics, about = result["metrics"][model], _dataset(result, column.split("/")[2])
    deciding = next((f"{column}/{name}" for name in DECIDING if f"{column}/{name}" in metrics), None)
    place = deciding, about["fingerprint"], about["split"]
    if deciding is None or place in {(one.metric, one.data, one.split) for one in found.standings}:
        return
    file = result.get("predictions", {}).get(model, {}).get(column)
    stored = None
    if file is not None and deciding.endswith(f"/{PAIRED}"):
        found.files[place] = run.path / file
        stored = _read_predictions(found.files[place])
    found.standings.append(Standing(deciding, metrics[deciding], about["fingerprint"], about["split"], stored))


def _dataset(result: dict[str, Any], name: str) -> dict[str, Any]:
    """{fingerprint, split, count} of a dataset's scored split, whichever format the result is of."""
    if result.get("format_version", 1) == 1:
        return {"fingerprint": result["data_fingerprint"], "split": result.get("split", "test"), "count": None}
    own = result["datasets"].get(name)
    about = own or result["datasets"][name.removesuffix(f".{SELECTION}")]
    split = SELECTION if name.endswith(f".{SELECTION}") else about["split"]
    return {"fingerprint": about["fingerprint"], "split": split, "count": about.get("count") if own else None}


def _read_predictions(path: Path) -> Predictions:
    try:
        tensors = load_file(path)
        return Predictions(tensors["correct"], tensors["labels"])
    except Exception as error:  # safetensors raises its own
        raise InputError(f"{path}: not readable as predictions: {str(error).splitlines()[0]}") from None


def deciding(standings: Sequence[Standing]) -> list[Standing]:
    """Those that a gate looks at: per protocol and data the selection split, or the test split where there is none."""
    selected = {(one.metric.split("/")[1], one.data) for one in standings if one.split == SELECTION}
    return [one for one in standings if one.split == SELECTION
            or (one.metric.split("/")[1], one.data) not in selected]  # fmt: skip


def write_evidence(evidence: Evidence, folder: Path) -> str:
    """Write what the next gate needs into an empty folder; returns the hash of evidence.json."""
    folder.mkdir(parents=True)
    entries = []
    for number, one in enumerate(deciding(evidence.standings)):
        entry: dict[str, Any] = {"metric": one.metric, "value": one.value, "data": one.data, "split": one.split}
        if one.predictions is not None:
            name = f"predictions-{number:02d}.safetensors"
            shutil.copyfile(evidence.files[one.metric, one.data, one.split], folder / name)
            entry |= {"predictions": name, "sha256": sha256_of(folder / name)}
        entries.append(entry)
    write_json(folder / EVIDENCE, {"format_version": 1, "standings": entries})
    return sha256_of(folder / EVIDENCE)


def read_evidence(folder: Path, expected: str) -> list[Standing]:
    """The standings that a version keeps; InputError where a file is not the one that was registered."""
    if not (folder / EVIDENCE).is_file() or sha256_of(folder / EVIDENCE) != expected:
        raise InputError(f"{folder / EVIDENCE}: missing, or not the one registered (tag vit.gate_evidence_sha256)")
    standings = []
    for entry in json.loads((folder / EVIDENCE).read_text())["standings"]:
        stored = None
        if name := entry.get("predictions"):
            if Path(name).name != name or not (folder / name).is_file() or sha256_of(folder / name) != entry["sha256"]:
                raise InputError(f"{folder / name}: missing, or not the one registered (sha256 in {EVIDENCE})")
            stored = _read_predictions(folder / name)
        standings.append(Standing(entry["metric"], entry["value"], entry["data"], entry["split"], stored))
    return standings

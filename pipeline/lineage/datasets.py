"""Finding the dataset that a run was trained on: where it lay, or anywhere in the home, known by its fingerprint."""

from pathlib import Path
from typing import Any

from pipeline.errors import FaultError, InputError
from pipeline.shards.index import DatasetIndex, read_index
from pipeline.storage.location import is_url


class Datasets:
    """Datasets by fingerprint. Each path is read once; a dataset that has moved into the home's `data` is found."""

    def __init__(self, home: Path | None):
        self.home = home
        self._read: dict[str, DatasetIndex | str] = {}

    def find(self, path: str, fingerprint: str) -> tuple[DatasetIndex | None, str]:
        """The dataset of this fingerprint, and how it was found, in words; None, and why it is not here."""
        index = self._at(path)
        if isinstance(index, DatasetIndex) and index.fingerprint == fingerprint:
            return index, "here"
        for other in sorted((self.home / "data").glob("*/index.json")) if self.home else ():
            moved = self._at(str(other.parent))
            if isinstance(moved, DatasetIndex) and moved.fingerprint == fingerprint:
                return moved, f"moved to {other.parent}"
        if isinstance(index, DatasetIndex):
            return None, f"{path} holds another dataset now, fingerprint {index.fingerprint}"
        return None, f"not reachable: {index}"

    def _at(self, path: str) -> DatasetIndex | str:
        if path not in self._read:
            try:
                self._read[path] = read_index(path if is_url(path) else Path(path))
            except (InputError, FaultError, OSError) as error:
                self._read[path] = str(error).splitlines()[0]
        return self._read[path]


def described(datasets: Datasets, recorded: dict[str, Any]) -> dict[str, Any]:
    """What is known of a dataset that a plan names: {path, name, fingerprint, weight?}, and where it is now."""
    index, words = datasets.find(recorded["path"], recorded["fingerprint"])
    facts = recorded | {"here": index is not None, "found": words, "certificate": None, "tombstones": None}
    if index is None:
        return facts
    certificate = index.directory / "certificate.json"
    is_there = isinstance(certificate, Path) and certificate.is_file()
    return facts | {
        "found_at": str(index.directory),
        "certificate": str(certificate) if is_there else None,
        "tombstones": len(index.tombstones),
        "samples": {split: index.num_samples(split) for split in index.splits},
        "made_from": dict(index.provenance.get("made_from", {})),
    }

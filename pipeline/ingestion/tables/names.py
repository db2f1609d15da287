"""Arrow tables by their names alone, and what the config says of columns: for those who need not import pyarrow."""

from collections.abc import Sequence
from typing import NamedTuple

PARQUET = ".parquet"


class SaidColumns(NamedTuple):
    """What the config says; None where the schema decides."""

    image: str | None = None
    label: str | None = None


UNSAID = SaidColumns()


def find_parquet(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(PARQUET)]


def saved_folders(names: Sequence[str]) -> list[str]:
    """The folders of saved datasets, with a final slash, or empty for the source itself."""
    known = set(names)
    folders = [name.removesuffix("state.json") for name in names if name.rpartition("/")[2] == "state.json"]
    return sorted(folder for folder in folders if f"{folder}dataset_info.json" in known)

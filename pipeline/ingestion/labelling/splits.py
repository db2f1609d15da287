"""Which split and which class folder an image of a source belongs to."""

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.ingestion.sources.listing import Source, SourceFile
from pipeline.shards.decoding import ImageFault

SPLIT_FOLDERS = {  # in lower case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
HASHED_BYTES = 1 << 16
BLOCK_FILES = 10_000  # so that millions of files do not wait in the threads' queue at once
READERS = 8  # threads: reading the beginning of a file is waiting for it


def split_of_folder(name: str) -> str | None:
    return SPLIT_FOLDERS.get(name.lower())


def root_folder(paths: Sequence[str]) -> str:
    """The folders, with a final slash, that merely wrap the set: `download/` where all are like `download/ant/1.jpg`.

    A folder whose images lie directly in it is no wrapper, and neither is one named as a split.
    """
    root = ""
    while True:
        below, deeper = set(), False
        for path in paths:
            top, slash, rest = path[len(root) :].partition("/")
            below.add(top)
            if not slash or len(below) > 1:
                return root
            deeper |= "/" in rest
        if not deeper or any(map(split_of_folder, below)):
            return root
        root += f"{below.pop()}/"


def folder_splits(paths: Sequence[str], root: str) -> dict[str, str]:
    """Path -> split for the images in folders named as splits; empty where there are no such folders.

    They are on top (`train/ant/1.jpg`), or below every class (`ant/train/1.jpg`).
    """
    tops = ((path, path[len(root) :].partition("/")) for path in paths)
    splits = {path: split for path, (top, slash, _) in tops if slash and (split := split_of_folder(top))}
    return splits or splits_below_classes(paths, root)


def splits_below_classes(paths: Sequence[str], root: str) -> dict[str, str]:
    """Path -> split where every image lies as `ant/train/1.jpg` does, else empty."""
    splits: dict[str, str] = {}
    for path in paths:
        _, _, rest = path[len(root) :].partition("/")
        folder, slash, _ = rest.partition("/")
        split = split_of_folder(folder) if slash else None
        if split is None:
            return {}
        splits[path] = split
    return splits


def class_folders(paths: Sequence[str], root: str) -> dict[str, str]:
    """Path -> class folder, the first one below the split's.

    One folder alone separates nothing, so it is no class, unless it is one in train (`val/images/` beside ImageNet's).
    """
    folders: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}  # one object for all images of a folder
    for path in paths:
        top, _, rest = path[len(root) :].partition("/")
        split = split_of_folder(top) or ""
        folder, slash, _ = (rest if split else path[len(root) :]).partition("/")
        if slash and folder != "..":
            folders.setdefault(split, {})[path] = names.setdefault(folder, folder)
    trained = set(folders.get("train", {}).values())
    trained = trained if len(trained) > 1 else set()
    classes: dict[str, str] = {}
    for by_path in folders.values():
        if len(found := set(by_path.values())) > 1 or found <= trained:
            classes = classes | by_path if classes else by_path
    return classes


def hash_splits(
    source: Source, files: Sequence[SourceFile], fractions: Mapping[str, float], seed: int,
    *, stamps_are_hashes: bool = False,
) -> dict[str, str]:  # fmt: skip
    """Path -> split, by a hash of the size and the first 64 KiB: equal files are never in two splits.

    A file that cannot be read goes by its path; it is rejected later. Where stamps are hashes of the content, nothing
    is read.
    """
    if stamps_are_hashes:
        return {
            file.path: split_at(hash_number(f"{seed}:split:{file.bytes}:{file.stamp}".encode()), fractions)
            for file in files
        }
    splits = {}
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(files), BLOCK_FILES):
            block = files[start : start + BLOCK_FILES]
            numbers = readers.map(lambda file: _content_hash(source, file, seed), block)
            splits |= {file.path: split_at(number, fractions) for file, number in zip(block, numbers, strict=True)}
    return splits


def _content_hash(source: Source, file: SourceFile, seed: int) -> float:
    try:
        beginning = source.read(file.path, HASHED_BYTES)
    except (OSError, ImageFault):
        beginning = file.path.encode(errors="surrogateescape")
    return hash_number(f"{seed}:split:{file.bytes}:".encode() + beginning)


def hash_number(content: bytes) -> float:
    """A number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "little") / (1 << 48)


def split_at(number: float, fractions: Mapping[str, float]) -> str:
    end = 0.0
    for split, fraction in fractions.items():
        end += fraction
        if number < end:
            return split
    return max(fractions, key=fractions.__getitem__)  # the fractions added up to a hair less than 1

"""Hashes of a registered model's files: SHA256SUMS beside them, as `sha256sum --check` reads it. Torch-free.

The version's tag `vit.artifact_sha256` holds the hash of SHA256SUMS itself, so that neither a file nor its line can be
changed unnoticed by whoever can write to the artifact store alone.
"""

import hashlib
from pathlib import Path

from pipeline.errors import InputError
from pipeline.run_directory import write_atomic

SUMS = "SHA256SUMS"


def sha256_of(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_in(directory: Path) -> list[str]:
    """Names of all files below, with forward slashes, in order."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def hashes_in(directory: Path) -> dict[str, str]:
    """The hash of every file below by its name."""
    return {name: sha256_of(directory / name) for name in files_in(directory)}


def write_sums(directory: Path) -> str:
    """Write SHA256SUMS of all other files below; returns its own hash."""
    hashes = hashes_in(directory)
    hashes.pop(SUMS, None)
    write_atomic(directory / SUMS, "".join(f"{digest}  {name}\n" for name, digest in hashes.items()))
    return sha256_of(directory / SUMS)


def require_intact(what: str, directory: Path, expected_sums: str | None) -> None:
    """InputError naming the first file that is not what SHA256SUMS says, or SHA256SUMS itself.

    `expected_sums` is the hash of SHA256SUMS that the registry holds, None where it holds none.
    """
    path, remedy = directory / SUMS, "it was damaged or changed; register the model again, or restore the file"
    if not path.is_file():
        if expected_sums is not None:
            raise InputError(f"{what}: {path} is missing; {remedy}")
        return  # registered before models had hashes
    if expected_sums is not None and sha256_of(path) != expected_sums:
        raise InputError(f"{what}: {path}: is not the list that was registered (tag vit.artifact_sha256); {remedy}")
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in path.read_text().splitlines())}
    for name, digest in hashes_in(directory).items():
        if name != SUMS and expected.pop(name, None) != digest:
            raise InputError(f"{what}: {directory / name}: its bytes are not those registered (sha256); {remedy}")
    for name in expected:
        raise InputError(f"{what}: {directory / name} is missing; {remedy}")

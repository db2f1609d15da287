"""Whether pods find a run where its submitter left it: on a volume at the same path, with rights to write it."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from cluster.kubernetes.profile import KubernetesProfile


def volume_problem(path: Path, profile: KubernetesProfile, what: str, *, to_write: bool) -> str | None:
    """A line where `path` lies on none of the profile's volumes, or on one that cannot be written."""
    under = [volume for volume in profile.volumes if path.is_relative_to(volume.path)]
    mounted = ", ".join(volume.path for volume in profile.volumes)
    if not under:
        return (
            f"{path}: {what} lies on no volume of the pods ({mounted}); put it there, or name its volume: "
            f"profile.volumes=[{{claim: NAME, path: {path.parent}}}]"
        )
    volume = max(under, key=lambda one: len(one.path))
    if to_write and volume.read_only:
        return f"{path}: {what} lies on claim {volume.claim}, which the profile mounts read_only; take that out"
    return None


def place_problems(
    directory: Path, reads: Iterable[str], profile: KubernetesProfile, owner: tuple[int, int]
) -> list[str]:  # fmt: skip
    """Of a run directory and of what is read beside it. A line each."""
    found = [volume_problem(directory, profile, "the run directory", to_write=True)]
    found += [volume_problem(Path(path), profile, "this dataset", to_write=False) for path in reads]
    return [line for line in found if line] or _rights(directory, owner)


def hand_over(directory: Path, owner: tuple[int, int]) -> None:
    """Where root prepared a run: give it to the user of the pods, which are never root."""
    if os.geteuid() != 0:
        return
    for path in (directory, *directory.rglob("*")):
        if (path.lstat().st_uid, path.lstat().st_gid) != owner:
            os.chown(path, *owner, follow_symlinks=False)


def _rights(directory: Path, owner: tuple[int, int]) -> list[str]:
    folders = [directory, *(path for path in directory.rglob("*") if path.is_dir() and path.name != "submit")]
    closed = next((path for path in folders if not _may_write(path, owner)), None)
    if closed is None:
        return []
    user, group = owner
    who = f"{closed.stat().st_uid}:{closed.stat().st_gid}, {stat.filemode(closed.stat().st_mode)}"
    return [
        f"{closed}: the pods run as {user}:{group} and cannot write it ({who}); chown or chmod it, or set "
        "profile.user and profile.group to its owner"
    ]


def _may_write(path: Path, owner: tuple[int, int]) -> bool:
    """By its mode: what access lists say besides is not looked at."""
    of, (user, group) = os.stat(path), owner
    bits = of.st_mode >> (6 if of.st_uid == user else 3 if of.st_gid == group else 0)
    return bits & 0b011 == 0b011

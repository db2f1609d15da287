"""The members of a tar, from its headers alone; compressed tars are unpacked first (see unpacking)."""

import posixpath
import tarfile
from collections.abc import Iterator

from pipeline.ingestion.archives.entries import Entry
from pipeline.storage.random_access import PathFile, UrlFile

MOST_LINKS = 16  # from one to the next


class TarFault(Exception):
    """A tar that cannot be read; one line."""


def tar_members(file: PathFile | UrlFile, shown: str) -> Iterator[tarfile.TarInfo]:
    """Every member in its order; TarFault, at the end, where the tar is cut, compressed or none."""
    end, last = 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # tarfile keeps them all, 1.5 kB each
                end = info.offset_data
                if info.isreg():
                    end += info.size + -info.size % tarfile.BLOCKSIZE
                last = f" after `{info.name}`"
                yield info
    except (tarfile.TarError, OSError) as error:
        raise TarFault(f"{shown}: not a whole, uncompressed tar ({error}){last}; fetch it again") from None
    # A tar that was cut between members, or is damaged in a header, ends like a whole one but for its end marker.
    marker = file.pread(tarfile.BLOCKSIZE, end)
    if marker.strip(b"\0") or len(marker) < tarfile.BLOCKSIZE:
        raise TarFault(f"{shown}: cut or damaged at byte {end}{last}: no end-of-archive marker; fetch it again")


def tar_entries(file: PathFile | UrlFile, shown: str, stamp: int) -> Iterator[Entry]:
    """Every file of the tar, links to files in it resolved; TarFault. `stamp` is the tar's: it has no checksums."""
    places: dict[str, tuple[int, int]] = {}  # of files, by their normal names
    links: list[tarfile.TarInfo] = []
    for info in tar_members(file, shown):
        if info.issym() or info.islnk():
            links.append(info)
        elif info.isreg() and not info.issparse():
            places[posixpath.normpath(info.name)] = info.offset_data, info.size
            yield Entry(info.name, info.offset_data, info.size, info.size, stamp)
        elif not info.isdir():
            fault = "a sparse file; unpack the tar" if info.isreg() else "not a regular file"
            yield Entry(info.name, 0, 0, 0, stamp, fault=fault)
    targets = {posixpath.normpath(link.name): _target(link) for link in links}
    for link in links:
        target = _target(link)
        for _ in range(MOST_LINKS):
            if target in places or target not in targets:
                break
            target = targets[target]
        kind = "symbolic link" if link.issym() else "hard link"
        fault = None if target in places else f"a {kind} to `{link.linkname}`, which is no file of the tar"
        offset, size = places.get(target, (0, 0))
        yield Entry(link.name, offset, size, size, stamp, fault=fault)


def _target(link: tarfile.TarInfo) -> str:
    """The member that a link means; a path that leaves the tar is the name of none."""
    folder = posixpath.dirname(link.name) if link.issym() else ""
    return posixpath.normpath(posixpath.join(folder, link.linkname))

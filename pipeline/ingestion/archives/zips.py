"""Reads zips where they lie: the central directory once, then any entry by one read.

Python's zipfile makes an object of some 700 bytes per entry and reads each local header on its own; here a million
entries pass through one at a time, and an entry behind a URL is one request. PKWARE's APPNOTE.TXT is the format.
"""

import stat
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from pipeline.errors import InputError
from pipeline.ingestion.archives.entries import DEFLATED, STORED, Entry
from pipeline.shards.decoding import ImageFault
from pipeline.storage.random_access import PathFile, UrlFile

_END = struct.Struct("<4s4H2LH")  # end of central directory
_LOCATOR = struct.Struct("<4sLQL")  # of the end of central directory of a Zip64
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # central directory header
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 0xFFFF
_FULL, _FULL_SHORT = 0xFFFFFFFF, 0xFFFF  # the true value is a Zip64 field
_ENCRYPTED, _UTF8 = 0x1, 0x800  # flags
_DOS_SYSTEMS = (0, 10, 14)  # FAT, NTFS, VFAT, where programs have written backslashes
_UNIX = 3
_METHODS = {9: "Deflate64", 12: "BZIP2", 14: "LZMA", 93: "Zstandard", 95: "XZ", 98: "PPMd", 99: "AES"}
_EXTRA_BYTES = 64  # a local header's extra field is mostly shorter; one more read where it is not
_SLACK = 1024  # of compressed bytes for a wanted number of plain ones

Pread = Callable[[int, int], bytes]


def zip_entries(file: PathFile | UrlFile, shown: str) -> Iterator[Entry]:
    """Every file of the zip, in the order of its central directory, directories left out; InputError if it is none."""
    directory, count, before = _central_directory(file, shown)
    at = seen = 0
    while at < len(directory):
        if directory[at : at + 4] != b"PK\1\2" or at + _ENTRY.size > len(directory):
            raise InputError(f"{shown}: its directory is damaged after {seen} entries; fetch it again")
        values = _ENTRY.unpack_from(directory, at)
        name_bytes, extra_bytes, comment_bytes = values[10:13]
        at += _ENTRY.size
        name = directory[at : at + name_bytes]
        extra = directory[at + name_bytes : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        seen += 1
        if not name.endswith(b"/"):
            entry = _entry(values, name, extra, before)
            outside = entry.offset + entry.stored > file.size
            yield entry._replace(fault="lies outside of the zip, which is damaged") if outside else entry
    if at != len(directory) or seen & _FULL_SHORT != count & _FULL_SHORT:
        raise InputError(f"{shown}: its directory holds {seen} entries of {count}; it is damaged, fetch it again")


def read_zip_entry(pread: Pread, row: np.void, num_bytes: int) -> bytes:
    """The first bytes of an entry, or all of them checked by its CRC; ImageFault where it is damaged.

    `row` is one of entries.ROW, whose entry is stored or deflated.
    """
    wanted, stored = int(row["bytes"]) if num_bytes < 0 else min(num_bytes, int(row["bytes"])), int(row["stored"])
    needed = stored if num_bytes < 0 else min(stored, wanted + _SLACK)
    offset, header_bytes = int(row["offset"]), _LOCAL.size + int(row["name_bytes"])
    content = pread(header_bytes + _EXTRA_BYTES + needed, offset)
    if len(content) < _LOCAL.size or not content.startswith(b"PK\3\4"):
        raise ImageFault("broken_image", "no entry of the zip where its directory says")
    start = _LOCAL.size + sum(_LOCAL.unpack_from(content)[9:11])
    if len(content) < start + needed:
        content += pread(start + needed - len(content), offset + len(content))
    content = content[start : start + needed]
    if row["method"] == DEFLATED:
        plain = _inflated(content, wanted)
        if len(plain) < wanted and needed < stored:
            plain = _inflated(content + pread(stored - needed, offset + start + needed), wanted)
        content = plain
    if num_bytes >= 0:
        return content[:wanted]
    if len(content) != wanted or zlib.crc32(content) != row["crc32"]:
        raise ImageFault("broken_image", f"CRC-32 {zlib.crc32(content):08x}, the zip says {int(row['crc32']):08x}")
    return content


def _inflated(content: bytes, wanted: int) -> bytes:
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, wanted + 1)[: wanted + 1] if wanted else b""
    except zlib.error as error:
        raise ImageFault("broken_image", f"does not inflate ({error})") from None


def _central_directory(file: PathFile | UrlFile, shown: str) -> tuple[bytes, int, int]:
    """(its bytes, the number of entries, the bytes before the zip itself, as of a self-extracting one)."""
    tail_bytes = min(file.size, _END.size + _LONGEST_COMMENT + _LOCATOR.size + _END_64.size)
    tail, tail_at = file.pread(tail_bytes, file.size - tail_bytes), file.size - tail_bytes
    found = tail.rfind(b"PK\5\6")
    while found >= 0 and not _is_whole(tail[found:]):
        found = tail.rfind(b"PK\5\6", 0, found)  # those four bytes in a comment
    if found < 0:
        what = "ends before its directory" if tail and file.pread(4, 0) == b"PK\3\4" else "no zip"
        raise InputError(f"{shown}: {what}; it is another kind of file, or was cut: fetch it again")
    _, disk, first_disk, _, count, size, offset, _ = _END.unpack_from(tail, found)
    end = tail_at + found
    if found >= _LOCATOR.size and tail[found - _LOCATOR.size :].startswith(b"PK\6\7"):
        _, _, end_64, _ = _LOCATOR.unpack_from(tail, found - _LOCATOR.size)
        beside = end - _LOCATOR.size - _END_64.size  # where it lies also in a zip that something was put before
        record, end = next(
            ((record, at) for at in (beside, end_64) if (record := file.pread(_END_64.size, at)).startswith(b"PK\6\6")),
            (b"", 0),
        )
        if len(record) < _END_64.size:
            raise InputError(f"{shown}: its Zip64 directory is not where it says; fetch it again")
        _, _, _, _, disk, first_disk, _, count, size, offset = _END_64.unpack(record)
    before = end - size - offset
    if disk or first_disk:
        raise InputError(f"{shown}: one part of a zip in several; join them (zip -s 0 PARTS --out WHOLE.zip)")
    if before < 0:
        raise InputError(f"{shown}: its directory is not where it says; it was cut or damaged: fetch it again")
    return file.pread(size, before + offset), count, before


def _is_whole(end: bytes) -> bool:
    return len(end) >= _END.size and _END.size + _END.unpack_from(end)[7] <= len(end)


def _entry(values: tuple, name: bytes, extra: bytes, before: int) -> Entry:
    _, made, _, flags, method, _, _, crc32, stored, plain, *_, attributes, offset = values
    if _FULL in (plain, stored, offset):
        plain, stored, offset = _wide(extra, plain, stored, offset)
    text = _text(name, flags)
    if made >> 8 in _DOS_SYSTEMS and "/" not in text:
        text = text.replace("\\", "/")
    fault = None
    if flags & _ENCRYPTED:
        fault = "encrypted; unpack the zip with its password"
    elif method not in (STORED, DEFLATED):
        fault = f"compressed by method {method} ({_METHODS.get(method, 'unknown')}); only stored and deflated are read"
    elif made >> 8 == _UNIX and stat.S_IFMT(attributes >> 16) not in (0, stat.S_IFREG):
        link = stat.S_ISLNK(attributes >> 16)
        fault = "a symbolic link in a zip" if link else "not a regular file"
    stamp = crc32 << 20 ^ plain
    return Entry(text, offset + before, stored, plain, stamp, crc32, method, len(name), fault)


def _wide(extra: bytes, *fields: int) -> list[int]:
    """The fields that a Zip64 extra field gives in full, in the order in which it gives them."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    numbers = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    return [next(numbers, field) if field == _FULL else field for field in fields]


def _text(name: bytes, flags: int) -> str:
    """The name as it was meant. Many programs write UTF-8 without the flag; what is none is code page 437."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("utf-8", "surrogateescape") if flags & _UTF8 else name.decode("cp437")

"""Requests to object stores: clients made per process, and every request tried again until patience ends.

fsspec's client of the protocol answers everything. Whole shards of s3:// and gs:// come through obstore where it may be
used: from a server on loopback it streams 64 MiB at 630 MB/s, s3fs at 110 to 180 for twice the processor time. Its
threads do not survive a fork, so a process whose parent has used it goes without.

Patience, from the environment: `VIT_STORAGE_STALL_SECONDS` (30) without a byte break a connection,
`VIT_STORAGE_PATIENCE_SECONDS` (120) without a byte, over all attempts, end in a FaultError.
"""

import hashlib
import importlib.util
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import FaultError, InputError

log = logging.getLogger(__name__)

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # of this package, by protocol
PART_BYTES = 8 << 20
LISTING_PATIENCE_SECONDS = 10  # a person waits for it, and nothing is lost by starting again
LEAST_PART_BYTES = 64 << 10  # what a connection that keeps breaking is asked for
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.1, 15.0

# obstore reads credentials from these variables only, fsspec's clients from files and profiles too.
_OBSTORE_CREDENTIALS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"),
}

# What clients say of an object that changes with its content, the best first.
_STAMPS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "last_modified", "mtime", "updated", "created")
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "PermissionDeniedError", "UnauthenticatedError")
_MISSING = ("NotFoundError",)
_UNREACHED = ("EndpointConnectionError", "ConnectTimeoutError", "ClientConnectorError", "ClientConnectorDNSError")
_IN_THE_WAY = (FileExistsError, NotADirectoryError, IsADirectoryError)  # of file://
_DEFECTS = (TypeError, AttributeError, NameError, NotImplementedError, ImportError, AssertionError)

Answer = TypeVar("Answer")


class Attempts:
    """The attempts of one request. Between them an exponential pause with jitter; without progress they end."""

    def __init__(self, url: str, longest_to_connect: float = float("inf")):
        self._url = url
        self._patience = _seconds("VIT_STORAGE_PATIENCE_SECONDS", 120)
        self._patience_to_connect = min(longest_to_connect, self._patience)
        self.progressed()

    def progressed(self) -> None:
        """A byte has come: count from here."""
        self._failures, self._since = 0, time.monotonic()

    def failed(self, error: Exception) -> None:
        """Pause before the next attempt, or raise: what no attempt mends, or FaultError when patience has ended."""
        unreached = _unreached(error)  # which fsspec's client of http:// calls a missing file
        if unreached is None and (isinstance(error, FileNotFoundError) or type(error).__name__ in _MISSING):
            raise FileNotFoundError(f"{self._url}: no such file") from error
        if isinstance(error, PermissionError) or type(error).__name__ in _REFUSED:
            hint = "give credentials that may read it by the environment"
            raise InputError(f"{self._url}: access refused ({_one_line(error)}); {hint}") from error
        if isinstance(error, (*_DEFECTS, *_IN_THE_WAY, InputError, FaultError)):
            raise error
        self._failures += 1
        pause = random.uniform(0.5, 1) * min(FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1), LONGEST_PAUSE_SECONDS)
        waited = time.monotonic() - self._since
        left = (self._patience if unreached is None else self._patience_to_connect) - waited
        if left <= 0:
            reached = "" if unreached is None else "cannot be reached: "
            raise FaultError(
                f"{self._url}: {reached}no answer in {self._failures} attempts "
                f"over {waited:.0f} s, last: {_one_line(unreached or error)}; check the server, or raise "
                "VIT_STORAGE_PATIENCE_SECONDS"
            ) from error
        log.info("%s: attempt %d failed (%s); again in %.1f s", self._url, self._failures, _one_line(error), pause)
        time.sleep(min(pause, left))  # and once more at the very end


def size_of(url: str) -> int:
    """Bytes of the object; FileNotFoundError, FaultError."""
    return int(_tried(url, lambda fs, path: fs.info(path)["size"]))


def exists(url: str) -> bool:
    return bool(_tried(url, lambda fs, path: fs.exists(path)))


def sizes_in(url: str) -> dict[str, int]:
    """Bytes of the objects directly under `url`, by name."""
    entries = _tried(url, lambda fs, path: fs.ls(path, detail=True))
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in entries if entry["type"] == "file"}


def files_below(url: str) -> list[tuple[str, int, int]]:
    """(path below `url`, bytes, stamp) of every object below it; the path of `url`, where it is an object, is empty.

    Nothing where there is no such prefix. A stamp changes with the content, as far as the store says so.
    """

    def listed(fs: Any, path: str) -> list[tuple[str, int, int]]:
        start = len(path.rstrip("/")) + 1
        return [
            (name[start:], int(entry["size"] or 0), _stamp(entry))
            for name, entry in fs.find(path, detail=True).items()
            if entry["type"] == "file" and not name.endswith("/")  # which consoles make to stand for a folder
        ]

    try:
        return _tried(url, listed, LISTING_PATIENCE_SECONDS)
    except FileNotFoundError:
        return []


def stamp_of(url: str) -> int:
    """A number that changes with the object's content; FileNotFoundError, FaultError."""
    return _tried(url, lambda fs, path: _stamp(fs.info(path)))


def is_file(url: str) -> bool:
    """Whether there is an object; FaultError where nobody answers, which clients' own `isfile` takes for no."""
    try:
        return _tried(url, lambda fs, path: fs.info(path)["type"] == "file", LISTING_PATIENCE_SECONDS)
    except FileNotFoundError:
        return False


def matching(url: str) -> list[str]:
    """The URLs of the objects that a pattern with `*`, `?` or `[]` matches, sorted."""
    fixed = url[: re.search(r"[*?[]", url).start()].rpartition("/")[0]
    bare: list[str] = []
    _tried(fixed, lambda fs, path: bare.append(path))
    found = _tried(url, lambda fs, path: fs.glob(path))
    start = len(bare[-1].rstrip("/"))
    return sorted(fixed + name[start:] for name in found)


def _stamp(entry: Mapping[str, Any]) -> int:
    said = next((entry[name] for name in _STAMPS if entry.get(name)), None)
    return int.from_bytes(hashlib.blake2b(f"{said}:{entry.get('size')}".encode(), digest_size=6).digest(), "little")


def names_in(url: str) -> list[str]:
    """What is directly under `url`, files and directories; nothing where there is no such prefix."""
    try:
        entries = _tried(url, lambda fs, path: fs.ls(path, detail=False))
    except FileNotFoundError:
        return []
    return [entry.rstrip("/").rpartition("/")[2] for entry in entries]


def upload(path: Path, url: str) -> None:
    """Copy a local file; FileNotFoundError where it, or the bucket, is not there."""
    _tried(url, lambda fs, target: fs.put_file(str(path), target))


def write(url: str, content: bytes) -> None:
    """Write a small object; FileNotFoundError where the bucket is not there."""
    _tried(url, lambda fs, path: fs.pipe_file(path, content))


def remove(url: str) -> None:
    """Remove an object, or all under a prefix; whatever is not there is gone already."""
    try:
        _tried(url, lambda fs, path: fs.rm(path, recursive=True))
    except FileNotFoundError:
        pass


def read_range(url: str, offset: int, size: int | None) -> bytes:
    """`size` bytes from `offset`, or all from there; fewer only where the object ends before."""
    end = None if size is None else offset + size

    def read(fs: Any, path: str) -> bytes:
        try:
            return fs.cat_file(path, start=offset if size is not None else None, end=end)
        except FileNotFoundError:
            raise
        except Exception:
            if size is not None and (now := fs.info(path)["size"]) < end:  # asked for what is not there
                return fs.cat_file(path, start=offset, end=now) if now > offset else b""
            raise

    return _tried(url, read)


def stream(url: str, size: int) -> Iterator[bytes]:
    """The first `size` bytes in pieces, fewer only where the object ends before; resumed where it broke."""
    reached, part, attempts = 0, PART_BYTES, Attempts(url)
    while reached < size:
        try:
            for piece in _pieces(url, reached, size, part):
                reached += len(piece)
                attempts.progressed()
                yield piece
            if reached >= size or size_of(url) <= reached:
                return
            raise OSError(f"the stream ended at byte {reached} of {size}")
        except Exception as error:
            part = max(part // 8, LEAST_PART_BYTES)
            attempts.failed(error)


def _pieces(url: str, start: int, size: int, part: int) -> Iterator[bytes]:
    store = _obstore(url)
    if store is None:
        for offset in range(start, size, part):
            content = _file_system(
                url, lambda fs, path, at=offset: fs.cat_file(path, start=at, end=min(at + part, size))
            )
            yield content
            if len(content) < min(part, size - offset):
                return
        return
    import obstore

    key = url.split("://", 1)[1].partition("/")[2]
    answer = obstore.get(store, key, options={"range": (start, size)})
    yield from map(memoryview, answer.stream(min_chunk_size=part))


def _tried(url: str, request: Callable[[Any, str], Answer], longest_to_connect: float = float("inf")) -> Answer:
    attempts = Attempts(url, longest_to_connect)
    while True:
        try:
            return _file_system(url, request)
        except Exception as error:
            attempts.failed(error)


def _file_system(url: str, request: Callable[[Any, str], Answer]) -> Answer:
    """The request on fsspec's client; fsspec keeps one per process and thread, and forgets them in a fork."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    try:
        fs, path = url_to_fs(url, **_client_options(protocol))
    except (ImportError, ValueError) as error:
        extra = EXTRAS.get(protocol)
        remedy = f"install the extra: uv sync --extra {extra}" if extra else "see fsspec's list of protocols"
        raise InputError(f"{url}: {protocol}:// cannot be read here ({_one_line(error)}); {remedy}") from None
    if protocol in ("s3", "s3a"):
        fs.retries = 1  # we try again ourselves, and bound how long
    return request(fs, path)


def _client_options(protocol: str) -> dict[str, Any]:
    stall = _seconds("VIT_STORAGE_STALL_SECONDS", 30)
    match EXTRAS.get(protocol):
        case "s3":
            timeouts = {"connect_timeout": stall, "read_timeout": stall}
            return {
                "use_listings_cache": False,
                "config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}},
            }
        case "gs":
            return {"use_listings_cache": False, "requests_timeout": stall}
        case _:
            return {"auto_mkdir": True} if protocol in ("file", "local") else {}


_obstore_lock = threading.Lock()
_obstore_process: int | None = None  # the process, or its ancestor, in which obstore has started its threads
_obstore_stores: dict[str, Any] = {}


def _obstore(url: str) -> Any | None:
    """obstore's client of the bucket; None where fsspec's must do."""
    global _obstore_process
    protocol, _, rest = url.partition("://")
    if not _obstore_may_serve(protocol) or "//" in rest or _obstore_process not in (None, os.getpid()):
        return None
    bucket, stall = f"{protocol}://{rest.partition('/')[0]}", _seconds("VIT_STORAGE_STALL_SECONDS", 30)
    _obstore_process = os.getpid()  # before the lock: a fork that copies it held must not wait for it
    with _obstore_lock:
        if bucket not in _obstore_stores:
            from obstore.store import from_url

            options = {
                "allow_http": _s3_endpoint().startswith("http://"),
                "connect_timeout": timedelta(seconds=stall),
                "read_timeout": timedelta(seconds=stall),
                "timeout": timedelta(days=1),  # of a whole shard: only a stall ends it
            }
            _obstore_stores[bucket] = from_url(bucket, client_options=options, retry_config={"max_retries": 0})
        return _obstore_stores[bucket]


def _obstore_may_serve(protocol: str) -> bool:
    has = os.environ.get
    known = any(has(name) for name in _OBSTORE_CREDENTIALS.get(protocol, ()))
    if protocol == "s3":
        placed = has("AWS_REGION") or has("AWS_DEFAULT_REGION") or has("AWS_ENDPOINT_URL")
        own_authority = has("AWS_CA_BUNDLE") and not _s3_endpoint().startswith("http://")
        known = known and bool(placed) and not has("AWS_PROFILE") and not own_authority
    return known and importlib.util.find_spec("obstore") is not None


def _s3_endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        seconds = default if not text else float(text)
        if seconds > 0:
            return seconds
    except ValueError:
        pass
    raise InputError(f"{name}={text}: not a number of seconds above 0; set it to {default:g}, or unset it")


def _unreached(error: BaseException | None) -> BaseException | None:
    """The failure to connect that `error` is, or comes from."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError) or type(error).__name__ in _UNREACHED:
            return error
        error = error.__cause__
    return None


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]

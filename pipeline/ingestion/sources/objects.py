"""A folder behind a URL: every object below it, each read by one request."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.ingestion.rejected import Rejected
from pipeline.ingestion.sources.listing import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    Listing,
    Source,
    SourceFile,
    SourceFiles,
    keep_images,
)
from pipeline.ingestion.sources.read_ahead import sent_ahead
from pipeline.shards.decoding import ImageFault
from pipeline.storage.location import Url, exists, files_below, location, read_range

WITH_BUCKETS = ("s3", "s3a", "gs", "gcs")


@dataclass(frozen=True)
class ObjectSource:
    """Every object below `root`."""

    root: Url

    def list_files(self) -> Listing:
        """InputError where there is nothing."""
        listing, files = Listing(), SourceFiles()
        for path, size, stamp in files_below(self.root):
            if not path:
                raise InputError(f"{self.root}: a file; give the folder that it lies in, a .zip or tars")
            if ".." in path.split("/"):
                listing.rejected.append(Rejected(path, "unsafe_name", "its name is no path within the folder"))
            else:
                files.append(SourceFile(path, size, stamp))
        if not files and not listing.rejected:
            raise InputError(f"{self.root}: {self._what_is_missing()}; a source holds images")
        keep_images(files, lambda path: self.read(path, HEAD_BYTES), listing)
        return listing

    def _what_is_missing(self) -> str:
        protocol, _, rest = str(self.root).partition("://")
        bucket, _, folder = rest.partition("/")
        if protocol not in WITH_BUCKETS:
            return "no such folder, or an empty one"
        if not exists(location(f"{protocol}://{bucket}")):
            return f"there is no bucket {bucket}"
        return f"the bucket {bucket} holds nothing in {folder}" if folder else f"the bucket {bucket} is empty"

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        content = read_range(self.root / path, 0, MAX_FILE_BYTES + 1 if num_bytes < 0 else num_bytes)
        if len(content) > MAX_FILE_BYTES:
            raise ImageFault("file_too_large", f"more than {MAX_FILE_BYTES} bytes")
        return content

    def narrowed(self, paths: Sequence[str]) -> Source:
        """The same, with the next of these files on their way while one is worked on."""
        return sent_ahead(self, paths, [self.root])

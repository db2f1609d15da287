"""A source of very many pictures that exist only when they are read, and what an ingestion of it takes.

    python -m tests.pipeline.ingestion.many_files NUM_FILES DEST

ingests it twice, the second time from the journal, and prints the peaks of memory and the seconds as JSON.
"""

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.ingest import IngestConfig
from pipeline.ingestion import build, plan
from pipeline.ingestion.opening import Opened
from pipeline.ingestion.sources.listing import Listing, SourceFile
from tests.pipeline.pictures import encoded, picture

NUM_BYTES = 2000  # of each file, by a comment as long as it takes


@dataclass(frozen=True)
class ManyFiles:
    """`num_files` different pictures in 1,000 class folders, named like ImageNet's."""

    num_files: int

    def list_files(self) -> Listing:
        listing = Listing()
        for number in range(self.num_files):
            folder = f"n{number % 1000:08d}"
            file = SourceFile(f"train/{folder}/{folder}_{number:08d}.jpg", NUM_BYTES, 1_700_000_000 * 10**9 + number)
            listing.images.append(file)
        return listing

    def read(self, path: str, num_bytes: int = -1) -> bytes:
        content = encoded(picture(int(path[-12:-4]), 64, 64))
        room = NUM_BYTES - len(content)
        content = content[:2] + b"\xff\xfe" + (room - 2).to_bytes(2) + bytes(room - 4) + content[2:]
        return content if num_bytes < 0 else content[:num_bytes]


def listed(num_files: int) -> Opened:
    return Opened(ManyFiles(num_files), ManyFiles(num_files).list_files())


def main(num_files: int, destination: Path) -> None:
    plan.list_source = lambda *_: listed(num_files)
    seconds = []
    for _ in range(2):
        started = time.monotonic()
        report = build.ingest("/many", destination, IngestConfig())
        seconds.append(time.monotonic() - started)
        assert sum(report.samples.values()) == num_files
    assert report.shards_written == 0
    peaks = [resource.getrusage(who).ru_maxrss << 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"peak_bytes": peaks[0], "peak_bytes_of_children": peaks[1], "seconds": seconds}))


if __name__ == "__main__":
    from tests.pipeline.ingestion import many_files  # by its name, as the children import it

    many_files.main(int(sys.argv[1]), Path(sys.argv[2]))

"""The certificate of a dataset, as readers need to know it: its files, and whether they are those that the index says.

A dataset that was made before there were certificates has none, and is sound.
"""

import hashlib

from pipeline.errors import FaultError
from pipeline.shards.index import DatasetIndex
from pipeline.storage.location import read_bytes

CERTIFICATE_NAME = "certificate.json"
PAGE_NAME = "certificate.html"


def certificate_faults(index: DatasetIndex) -> list[str]:
    """One line per file of the certificate that is missing or is not the one of this dataset."""
    said = index.provenance.get("certificate")
    faults = []
    for name in (CERTIFICATE_NAME, PAGE_NAME) if isinstance(said, dict) else ():
        path = index.directory / name
        try:
            content = read_bytes(path)
        except (OSError, FaultError):
            faults.append(f"{path}: missing; the ingestion that made the dataset writes it again")
            continue
        if hashlib.sha256(content).hexdigest() != said.get(name):
            faults.append(f"{path}: edited since the ingestion wrote it, which writes it again")
    return faults

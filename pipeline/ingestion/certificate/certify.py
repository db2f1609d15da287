"""`certificate.json` and `certificate.html`: what is in a dataset, in a form that a reviewer would sign.

They are written before the index, which holds their SHA-256, so that a dataset that can be read has its certificate.
The same dataset gives the same bytes under the same versions of Python, Pillow and numpy, which are in them: no time,
no name of a machine, no destination is. A later run keeps the certificate that is there, with the versions it says.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.ingestion.certificate.facts import certificate_facts
from pipeline.ingestion.certificate.page import certificate_page
from pipeline.ingestion.certificate.pictures import contact_sheets, pair_pictures
from pipeline.ingestion.duplicates.search import CopySearch
from pipeline.ingestion.labelling.layout import Layout
from pipeline.ingestion.rejected import Rejected, rejected_lines
from pipeline.ingestion.shard_contract import ShardSummary
from pipeline.shards.atomic import sync_directory, write_file
from pipeline.shards.certificate import CERTIFICATE_NAME, PAGE_NAME
from pipeline.shards.index import INDEX_NAME, DatasetIndex, read_index

VERSION = 2  # raise it when the same dataset would have another certificate


@dataclass(frozen=True)
class Evidence:
    """What an ingestion knows beside the index; `search` is None where pixels were not looked at."""

    summaries: Sequence[ShardSummary]
    rejected: Sequence[Rejected]
    search: CopySearch | None
    notes: Sequence[str] = ()  # of the plan: what is good to know of the source
    layout: Layout = Layout()


@dataclass(frozen=True)
class Certificate:
    """`sha256` of each file and of what they rest on, as the index says them; `verdict` in one line; its findings."""

    page: Path
    sha256: Mapping[str, str]
    verdict: str
    findings: tuple[str, ...]


def certify(index: DatasetIndex, config: IngestConfig, evidence: Evidence) -> Certificate:
    """Write the certificate of a dataset whose index is not written yet, or keep the one that is there.

    Where something else is certified than before, the index that is there is removed first.
    """
    page = index.directory / PAGE_NAME
    basis = _basis(index, config, evidence)
    if (known := _known_certificate(index.directory)) and known[0]["basis"] == basis:
        return Certificate(page, *known)
    facts = certificate_facts(
        index, config, evidence.summaries, evidence.rejected, evidence.search, evidence.notes, evidence.layout
    )
    sheets = [] if evidence.search is None else contact_sheets(index)
    pictures = pair_pictures(facts, evidence.search)
    content = json.dumps(_public(facts), indent=1).encode() + b"\n"
    html = certificate_page(facts, sheets, pictures).encode("utf-8", "backslashreplace")
    (index.directory / INDEX_NAME).unlink(missing_ok=True)
    sync_directory(index.directory)
    write_file(index.directory / CERTIFICATE_NAME, content)
    write_file(page, html)
    sha256 = {"basis": basis, CERTIFICATE_NAME: _sha256(content), PAGE_NAME: _sha256(html)}
    return Certificate(page, sha256, facts["verdict"]["words"], tuple(facts["verdict"]["findings"]))


def _basis(index: DatasetIndex, config: IngestConfig, evidence: Evidence) -> str:
    """The same where the certificate would be: a hash of all that it says."""
    search = evidence.search
    content = [
        VERSION, index.fingerprint, repr(replace(index, directory=Path())), config.model_dump_json(exclude={"workers"}),
        _sha256(rejected_lines(evidence.rejected)), repr([summary.counts for summary in evidence.summaries]),
        *evidence.notes,
        *evidence.layout.findings, *evidence.layout.notes,
    ]  # fmt: skip
    if search is not None:
        others = [(str(other.directory), other.fingerprint) for other in search.dataset.others]
        content += [search.dataset.basis, others]
    return _sha256(repr(content).encode(errors="surrogateescape"))


def _known_certificate(directory: Path) -> tuple[Mapping[str, str], str, tuple[str, ...]] | None:
    """What the index that is there says of its certificate, verdict and findings, if both files are as it says."""
    try:
        said: Any = read_index(directory).provenance.get("certificate")
        files = {name: (directory / name).read_bytes() for name in (CERTIFICATE_NAME, PAGE_NAME)}
    except (InputError, OSError):
        return None
    if not isinstance(said, dict) or "basis" not in said:
        return None
    if any(said.get(name) != _sha256(content) for name, content in files.items()):
        return None
    verdict = json.loads(files[CERTIFICATE_NAME])["verdict"]
    return said, verdict["words"], tuple(verdict["findings"])


def _public(facts: Any) -> Any:
    """Without what only the page needs."""
    if isinstance(facts, dict):
        return {key: _public(value) for key, value in facts.items() if not key.startswith("_")}
    return [_public(value) for value in facts] if isinstance(facts, list) else facts


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

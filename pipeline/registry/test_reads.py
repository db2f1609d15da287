"""How often a test split was read to score a version: once is a measurement, often is a selection. Torch-free.

The count is the version's tag `vit.test_reads`, JSON of {"PROTOCOL/DATASET FINGERPRINT": count}. Two processes that
count at the same moment may count once.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from pipeline.errors import InputError
from pipeline.registry.store_file import require_writable_store
from pipeline.registry.versions import connected, registered_version

TAG = "vit.test_reads"


def read_key(protocol: str, dataset: str, fingerprint: str) -> str:
    """What is counted: a protocol on the test split of a dataset of this content."""
    return f"{protocol}/{dataset} {fingerprint}"


def recorded_reads(reference: str, *, tracking_uri: str | None = None) -> dict[str, int]:
    """How often each test split was read for `models:/NAME/VERSION` or `models:/NAME@ALIAS`, by `read_key`.

    `tracking_uri` is by default MLflow's own where it is set. InputError where there is no such version.
    """
    return _reads(_version(reference, tracking_uri)[1].tags)


def record_test_read(reference: str, key: str, *, tracking_uri: str | None = None) -> int:
    """Count one more read of a test split by this version; returns how often it was read by now."""
    client, version = _version(reference, tracking_uri, to_write=True)
    reads = _reads(version.tags)
    reads[key] = reads.get(key, 0) + 1
    client.set_model_version_tag(version.name, version.version, TAG, json.dumps(reads, sort_keys=True))
    return reads[key]


def merged_reads(tags: Mapping[str, str], found: Mapping[str, int]) -> str:
    """The tag's text after `found` evaluations: a version that was counted before keeps the larger count."""
    recorded = _reads(tags)
    reads = {key: max(recorded.get(key, 0), found.get(key, 0)) for key in recorded.keys() | found.keys()}
    return json.dumps(reads, sort_keys=True)


def _reads(tags: Mapping[str, str]) -> dict[str, int]:
    try:
        return {str(key): int(count) for key, count in json.loads(tags.get(TAG, "{}")).items()}
    except (ValueError, AttributeError):
        raise InputError(f"tag {TAG}: {tags[TAG]!r} is not JSON of counts; correct it in MLflow") from None


def _version(reference: str, tracking_uri: str | None, *, to_write: bool = False) -> tuple[Any, Any]:
    import mlflow

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and mlflow.is_tracking_uri_set():
        uri = mlflow.get_tracking_uri()
    if uri is None:
        raise InputError(f"MODEL `{reference}`: which registry? set MLFLOW_TRACKING_URI")
    if to_write:
        require_writable_store(uri)
    client = connected(uri)
    return client, registered_version(client, reference, uri)

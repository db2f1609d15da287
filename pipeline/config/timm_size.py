"""How large a network of timm is, asked of a process that may load torch; once for each network. Itself torch-free."""

import json
import subprocess
import sys
from functools import lru_cache

from models.encoders.timm_config import TimmEncoderConfig
from pipeline.errors import InputError


def timm_size(encoder: TimmEncoderConfig) -> dict[str, float]:
    """See `models.timm_network.measured_size`; InputError where timm has no such network, or not with its arguments."""
    return _asked(encoder.model_dump_json())


@lru_cache
def _asked(encoder: str) -> dict[str, float]:
    process = subprocess.run(
        [sys.executable, "-m", "models.encoders.timm_network"], input=encoder, capture_output=True, text=True
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no word"])[-1]
        raise InputError(f"encoder: {last.removeprefix('error: ')}")
    return json.loads(process.stdout.splitlines()[-1])

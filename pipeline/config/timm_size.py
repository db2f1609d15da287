"""How large an objective's module is with a network of timm, asked of a process that may load torch; once for each.

Itself torch-free."""

import json
import subprocess
import sys
from functools import lru_cache

from models.encoders.timm_config import TimmEncoderConfig
from models.objectives.config import ObjectiveConfig
from pipeline.errors import InputError


def timm_size(encoder: TimmEncoderConfig, objective: ObjectiveConfig) -> dict[str, float]:
    """See `models.measured_size`; InputError where timm has no such network, or not with its arguments."""
    return _asked(encoder.model_dump_json(), objective.model_dump_json())


@lru_cache
def _asked(encoder: str, objective: str) -> dict[str, float]:
    asked = f'{{"encoder": {encoder}, "objective": {objective}}}'
    process = subprocess.run(
        [sys.executable, "-m", "models.measured_size"], input=asked, capture_output=True, text=True
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no word"])[-1]
        raise InputError(f"encoder: {last.removeprefix('error: ')}")
    return json.loads(process.stdout.splitlines()[-1])

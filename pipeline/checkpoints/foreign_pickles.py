"""Pickles of others, looked through before any of them is opened by a program that runs what they say.

torch disassembles them without running anything, and refuses every instruction that could name a function at run time;
so what a pickle may call stands in it in plain text. Parameters' names become folders of DeepSpeed's converter, so they
are looked at, too.
"""

import importlib
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pipeline.errors import InputError

DEEPSPEEDS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "argparse.Namespace",
)  # beside what torch itself allows: tensors, their storages, plain containers
PREFIXES = ("mp_rank_", "zero_pp_rank_", "bf16_zero_pp_rank_", "fp16_zero_pp_rank_", "layer_", "model_")


def require_harmless(folder: Path) -> None:
    """InputError naming the first file that DeepSpeed's converter may open and that would do more than hold tensors."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.suffix == ".pt" or path.name.startswith(PREFIXES):
            for name in _parameter_names(load_harmless(path)):
                if Path(name).name != name or name in ("", ".", ".."):
                    raise InputError(f"{path}: a parameter is called {name!r}, a way out of its folder; not imported")


def load_harmless(path: Path) -> Any:
    """The content of a torch file of DeepSpeed's, its tensors mapped, not read. InputError where it could run."""
    try:
        foreign = sorted(set(get_unsafe_globals_in_checkpoint(str(path))) - set(DEEPSPEEDS))
        if foreign:
            raise InputError(f"{path}: a pickle that would run {', '.join(foreign)}; not imported")
        with safe_globals([_named(name) for name in DEEPSPEEDS]):
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (ValueError, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read without running what it says ({first_line}); not imported") from None


def _named(name: str) -> Any:
    module, _, what = name.rpartition(".")
    return getattr(importlib.import_module(module), what)


def _parameter_names(content: Any) -> Iterable[str]:
    """Names that are keys of what DeepSpeed stores by parameter."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key in ("param_shapes", "module", "param_slice_mappings", "buffer_names", "frozen_param_shapes"):
            for part in value if isinstance(value, (list, tuple)) else [value or {}]:
                yield from (str(name) for name in part) if isinstance(part, dict) else [str(part)]
        elif isinstance(value, dict):
            yield from _parameter_names(value)

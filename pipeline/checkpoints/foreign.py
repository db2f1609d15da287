"""Reading what DeepSpeed's `save_checkpoint` and accelerate's `save_state` write: weights and AdamW's moments.

DeepSpeed's own converter to its universal format takes its ZeRO partitions apart, at any stage and world size; what it
leaves is a weight and two moments per parameter. Its files are pickles, so each is looked through first, and one that
could run anything is refused. Of accelerate's the weights are safetensors, and the rest is read as weights alone.
"""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.checkpoints.foreign_pickles import load_harmless, require_harmless
from pipeline.errors import FaultError, InputError

KINDS = ("fp32", "exp_avg", "exp_avg_sq")
WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
OWN_PREFIXES = ("", "encoder.")  # what our objectives put before the names of timm's model

Parameters = Mapping[str, Tensor]  # of the run's network, by name, in their order


class Foreign(NamedTuple):
    """A state after `step` updates, by the names of the run's network where they agree but for a prefix."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, tuple[Tensor, Tensor]]  # exp_avg and exp_avg_sq of what was trained


def read_deepspeed(source: Path, parameters: Parameters, scratch: Path) -> Foreign | None:
    """What `save_checkpoint`, or accelerate's `save_state` with DeepSpeed, wrote; None where the source is no such."""
    folder = _tag_directory(source)
    if folder is None:
        return None
    require_harmless(folder)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        stored = _converted(folder, Path(temporary)) / "zero"
        theirs = {path.name: path for path in stored.iterdir() if path.is_dir()}
        weights, moments = {}, {}
        for name, ours in _our_names(theirs, parameters).items():
            weights[ours], *both = (_tensor(theirs[name] / f"{kind}.pt") for kind in KINDS)
            if all(moment is not None for moment in both):
                moments[ours] = tuple(both)
    states = next(folder.glob("*model_states.pt"))
    step = int(load_harmless(states)["global_steps"])
    return Foreign(step, weights, moments)


def _tag_directory(source: Path) -> Path | None:
    """Where DeepSpeed's files lie: named by `latest`, in accelerate's `pytorch_model`, or right here."""
    latest = source / "latest"
    candidates = [source / latest.read_text().strip()] if latest.is_file() else []
    folders = [*candidates, source / "pytorch_model", source]
    return next((folder for folder in folders if any(folder.glob("*_optim_states.pt"))), None)


def _converted(folder: Path, scratch: Path) -> Path:
    universal = scratch / "universal"
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder),
        "--output_folder", str(universal), "--inject_missing_state", "--num_extract_workers", "1",
        "--num_merge_workers", "1",
    ]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no word"])[-1]
        raise FaultError(f"{folder}: DeepSpeed cannot convert it: {last}")
    return universal


def _tensor(path: Path) -> Tensor | None:
    """A tensor of the universal format; None where there is none, as a moment of what was not trained."""
    if not path.is_file():
        return None
    stored = torch.load(path, weights_only=True, map_location="cpu")
    return stored["param"] if isinstance(stored, dict) else stored


def _our_names(theirs: Iterable[str], parameters: Parameters) -> dict[str, str]:
    """Our name for each of theirs: without the wrappers around all, and behind the prefix that makes them agree."""
    bare = {name: name for name in theirs}
    while bare and (wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in bare.values())), None)):
        bare = {name: inner.removeprefix(wrapper) for name, inner in bare.items()}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    for prefix in OWN_PREFIXES:
        named = {name: prefix + inner for name, inner in bare.items()}
        if trained <= set(named.values()):
            return named
    return bare


def read_accelerate(source: Path, parameters: Parameters) -> Foreign | None:
    """What accelerate's `save_state` wrote without DeepSpeed; None where the source is no such.

    InputError where a file cannot be read, or the optimizer is not AdamW on the run's parameters in their order.
    """
    stored, optimizer = (
        next((source / name for name in names if (source / name).is_file()), None)
        for names in (("model.safetensors", "pytorch_model.bin"), ("optimizer.bin", "optimizer.pt"))
    )
    if stored is None or optimizer is None:
        return None
    weights = _loaded(stored)
    named = _our_names(weights, parameters)
    content = _loaded(optimizer)
    states = content["state"]
    if not states or not all({"step", *KINDS[1:]} <= state.keys() for state in states.values()):
        raise InputError(f"{optimizer}: holds no moments of AdamW after a step; for weights alone say initialise_from")
    steps = {int(state["step"]) for state in states.values()}
    if len(steps) > 1:
        raise InputError(f"{optimizer}: its parameters were updated {min(steps)} to {max(steps)} times; must be alike")
    moments = {
        name: (states[index]["exp_avg"], states[index]["exp_avg_sq"])
        for name, index in _places(optimizer, content, parameters).items()
    }
    return Foreign(steps.pop(), {named[name]: weight for name, weight in weights.items()}, moments)


def _loaded(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None


def _places(path: Path, content: Mapping[str, Any], parameters: Parameters) -> dict[str, int]:
    """The number under which an optimizer's file has each parameter: by the names it holds, or by order and shape."""
    groups, states = content["param_groups"], content["state"]
    if all("param_names" in group for group in groups):
        names = {
            number: name for group in groups for number, name in zip(group["params"], group["param_names"], strict=True)
        }
        numbers = {names[number]: number for number in states}
        named = _our_names(numbers, parameters)
        return {named[name]: number for name, number in numbers.items()}
    order = {name: parameter.shape for name, parameter in parameters.items() if parameter.requires_grad}
    if len(order) != len(states):  # it trained what is frozen here
        order = {name: parameter.shape for name, parameter in parameters.items()}
    places: dict[str, int] = {}
    for group in groups:  # in each the order of the network; no two may have parameters of one shape
        numbers = [number for number in group["params"] if number in states]
        shapes = [states[number]["exp_avg"].shape for number in numbers]
        members = [name for name, shape in order.items() if shape in shapes]
        if [order[name] for name in members] != shapes or places.keys() & set(members):
            raise InputError(
                f"{path}: its parameters cannot be told apart by the order of the run's and their shapes; save it from "
                "an optimizer made of `model.named_parameters()`, which stores their names"
            )
        places |= zip(members, numbers, strict=True)
    return places

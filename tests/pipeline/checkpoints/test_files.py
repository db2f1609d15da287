"""The files of a checkpoint: written whole or loudly not, and one of each format read for ever."""

import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from pipeline.checkpoints.checksums import is_intact
from pipeline.checkpoints.files import StoredFragments, fragments_header, read_weights, write_parts
from pipeline.checkpoints.reading import read_parts
from pipeline.errors import FaultError
from pipeline.run_directory import Checkpoint, verified_manifest

SUMS = {
    "fp32": 397.09819147271605,
    "exp_avg": 2.450049438282666,
    "exp_avg_sq": 0.18549350835066947,
    "ema": 397.0486864411202,
}  # of absolute values over all parameters
FORMATS = sorted((Path(__file__).parents[2] / "golden").glob("checkpoint_format_*/step-*"))
assert FORMATS


def test_a_written_file_is_safetensors_and_has_the_hash_and_size_it_says(tmp_path):
    flat = torch.arange(3_000_000, dtype=torch.float32)  # more than one piece
    header = fragments_header({"a@0@fp32": 1_000_000, "é@7@ema": 2_000_000})
    entry = write_parts(tmp_path / "file.safetensors", [header, memoryview(flat.numpy()).cast("B")])
    content = (tmp_path / "file.safetensors").read_bytes()
    assert entry == {"file.safetensors": {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}}
    assert is_intact(tmp_path / "file.safetensors", entry["file.safetensors"])
    tensors = load_file(tmp_path / "file.safetensors")
    assert torch.equal(tensors["a@0@fp32"], flat[:1_000_000]) and torch.equal(tensors["é@7@ema"], flat[1_000_000:])


def test_a_full_disk_is_a_fault_that_names_the_file():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(FaultError, match="/dev/full: cannot be written: No space left on device"):
        write_parts(Path("/dev/full"), [b"x" * 100])


@pytest.mark.parametrize("directory", FORMATS, ids=lambda path: path.parent.name)
def test_a_checkpoint_of_every_format_loads(directory):
    checkpoint = Checkpoint(directory, verified_manifest(directory))
    assert all(is_intact(directory / name, entry) for name, entry in checkpoint.manifest["files"].items())
    stored, sums = StoredFragments(checkpoint), {}
    for name, shape in checkpoint.manifest["shapes"].items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq", "ema"):
            flat = torch.empty(torch.Size(shape).numel())
            read_parts(stored.parts(name, kind, 0, flat))
            sums[kind] = sums.get(kind, 0.0) + flat.double().abs().sum().item()
    assert sums == pytest.approx(SUMS, rel=1e-6)
    average = sum(tensor.double().abs().sum().item() for tensor in read_weights(checkpoint).values())
    assert average == pytest.approx(SUMS["ema"], rel=1e-6)

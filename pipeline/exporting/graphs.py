"""Formats that carry the network along: torch.export's archive, ONNX, and ONNX with weights of 8 bits.

Of any batch size. 8 bits are onnxruntime's dynamic quantisation, per output channel: on two cores of an AMD EPYC with
VNNI, a ViT-S/16 took a fifth of the time of torchao's, which was slower than float32, in half the bytes of its archive.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

ONE_FILE_BYTES = 1_800_000_000  # of weights; protobuf holds two GiB
MOST_IMAGES = 65_536  # in a batch


class UntraceableError(Exception):
    """A network that torch's exporters cannot follow."""


def write_program(network: nn.Module, example: Tensor, folder: Path, facts: Mapping[str, str]) -> None:
    """`model.pt2`: a zip of the graph as JSON and the weights as raw numbers. No pickle is in it: the file of example
    inputs, which torch would pickle, is empty. `facts` go in as further files.

    Shape:
        example: (2, C, H, W)
    """
    with _quiet():
        program = _traced(network, example)
        program.example_inputs = None
        archive = io.BytesIO()  # of a file on a full disk torch's writer ends the process
        torch.export.save(program, archive, extra_files=dict(facts))
    (folder / "model.pt2").write_bytes(archive.getbuffer())


def write_onnx(network: nn.Module, example: Tensor, folder: Path, output: str, facts: Mapping[str, str]) -> None:
    """`model.onnx`, from `images` to `output`; `facts` are its metadata."""
    large = sum(parameter.nbytes for parameter in network.parameters()) > ONE_FILE_BYTES
    for module in network.modules():
        if hasattr(module, "fused_attn"):  # the fused one's strides are not those of what it is decomposed into
            module.fused_attn = False
    with _quiet():
        program = _traced(network, example)
        converted = _converted(program, output)
    converted.model.metadata_props.update(facts)
    converted.save(folder / "model.onnx", external_data=large)


def _converted(program: torch.export.ExportedProgram, output: str) -> torch.onnx.ONNXProgram:
    try:
        return torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=[output], verbose=False)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UntraceableError(f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}") from error


def write_int8(network: nn.Module, example: Tensor, folder: Path, output: str, facts: Mapping[str, str]) -> None:
    """`model.onnx` as `write_onnx` writes it, whose matrices are of 8 bits and a scale per output channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_onnx(network, example, Path(scratch), output, facts)
        with _quiet():
            quantize_dynamic(
                Path(scratch) / "model.onnx", folder / "model.onnx", op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=_in_parts(Path(scratch)),
            )  # fmt: skip


def _in_parts(folder: Path) -> bool:
    return len(list(folder.iterdir())) > 1


def _traced(network: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    try:
        with torch.no_grad():
            return torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch raises a dozen kinds
        raise UntraceableError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

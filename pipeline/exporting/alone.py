"""Opens an export with its own library and answers questions about it: `python alone.py FORMAT FOLDER THREADS`.

It imports nothing of this project, so what it says of an export anybody's program would find. Questions are lines of
JSON on standard input, one answer each on standard output. Everything is computed on the processor.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Forward = Callable[[np.ndarray], np.ndarray]  # (B, C, H, W) float32, normalised, to (B, V) or (B, D)
BATCH = 32


def opened(format: str, folder: Path, threads: int) -> Forward:
    """The export in `folder` as a function of images."""
    match format:
        case "onnx" | "int8":
            return _opened_onnx(folder / "model.onnx", threads)
        case "pt2":
            import torch

            return of_module(torch.export.load(str(folder / "model.pt2")).module(), threads)
        case "hf":
            return _opened_hf(folder, threads)
        case _:
            import timm

            return of_module(timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), threads)


def _opened_onnx(file: Path, threads: int) -> Forward:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle, it leaves the cores to others
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _opened_hf(folder: Path, threads: int) -> Forward:
    import transformers

    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(what):
            raise ValueError(f"{what}: {sorted(map(str, info[what]))[0]}")
    read = {"ViTModel": lambda out: out.last_hidden_state[:, 0], "BeitModel": lambda out: out.pooler_output}
    return of_module(model.eval(), threads, read.get(name, lambda out: out.logits))


def of_module(module, threads: int, read: Callable = lambda out: out) -> Forward:
    import torch

    torch.set_num_threads(threads)

    def forward(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return read(module(torch.from_numpy(images))).numpy()

    return forward


def serve(load: Callable[[], Forward]) -> None:
    """Answer questions until there are no more: `outputs` of images in a file to another, the seconds (`time`) of one
    forward of so many of them, and the `peak` of this process's memory, bytes, until now."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print are not answers
    forward = load()
    for line in sys.stdin:
        question = json.loads(line)
        images = np.load(question["images"], mmap_mode="r") if "images" in question else np.empty(0)
        match question["do"]:
            case "time":
                batch = np.ascontiguousarray(images[: question["batch"]])
                started = time.perf_counter()
                forward(batch)
                answer = time.perf_counter() - started
            case "outputs":
                starts = range(0, len(images), BATCH)
                parts = [forward(np.ascontiguousarray(images[start : start + BATCH])) for start in starts]
                np.save(question["to"], np.concatenate(parts).astype(np.float32))
                answer = None
            case _:
                answer = peak_bytes()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def peak_bytes() -> int:
    """The most memory that this process had; what `getrusage` says may be its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line[:6] == "VmHWM:")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    kind, place, count = sys.argv[1:]
    serve(lambda: opened(kind, Path(place), int(count)))

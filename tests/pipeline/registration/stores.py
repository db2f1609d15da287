"""Models, evaluations and registrations for the tests, without a training: real weights, a real MLflow store."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder
from pipeline.config.stages import RegisterConfig
from pipeline.preparation.training import dump_config
from pipeline.rank import Rank
from pipeline.registration.publish import register
from pipeline.registry.export import export_timm_directory
from pipeline.registry.locate import ModelSource, locate_model
from pipeline.run_directory import RunDirectory, read_json, write_json

SMALL = {"name": "vit_ti16", "image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
FINGERPRINT = "f" * 64


def exported(directory: Path, seed: int = 0, *, num_classes: int = 3, outputs: str = "softmax", **encoder) -> Path:
    """A model in timm's layout, as if step `seed` of a run had made it."""
    torch.manual_seed(seed)
    config = EncoderConfig(**SMALL | encoder)
    network = build_encoder(config, num_classes)
    if num_classes:
        torch.nn.init.normal_(network.head.weight)
    lineage = {"run": "/elsewhere/run", "step": seed, "data_fingerprint": FINGERPRINT}
    source = ModelSource(
        "x", "checkpoint", "x", encoder=config.model_dump(), num_classes=num_classes,
        classes=tuple("abcdefgh")[:num_classes], mean=(0.5,) * 3, std=(0.5,) * 3, evaluation_crop=1.0,
        objective="supervised", outputs=outputs, lineage=lineage,
    )  # fmt: skip
    export_timm_directory(network, source, directory, {})
    return directory


def evaluated(
    run: Path, model: Path, correct: np.ndarray, *, fingerprint: str = FINGERPRINT, protocol: str = "classify-v1",
    splits: tuple[str, ...] = ("validation", "test"), predictions: bool = True,
) -> Path:  # fmt: skip
    """A finished evaluation of a model, with so many right of each split."""
    source = locate_model(str(model), tracking_uri="", home=run)
    (run / "predictions").mkdir(parents=True)
    write_json(run / "plan.json", {"stage": "evaluate", "sources": {"model": source.as_dict()}})
    metrics, intervals, files, datasets = {}, {}, {}, {}
    for split in splits:
        name = "ants.validation" if split == "validation" else "ants"
        key = f"eval/{protocol}/{name}"
        metrics |= {f"{key}/top1": float(correct.mean()), f"{key}/count": float(len(correct))}
        intervals[f"{key}/top1"] = [float(correct.mean()) - 0.01, float(correct.mean()) + 0.01]
        datasets[name] = {"path": "/data/ants", "fingerprint": fingerprint, "split": split, "count": len(correct)}
        labels = np.arange(len(correct)) % 3
        columns = {"predicted": labels, "labels": labels, "correct": correct.astype(np.float32)}
        columns["confidence"] = np.ones(len(correct), np.float32)
        if predictions:
            files[key] = f"predictions/{name}.safetensors"
            save_file(columns, run / files[key])
    result = {"format_version": 2, "stage": "evaluate", "metrics": {"model": metrics}, "datasets": datasets}
    result |= {"intervals": {"model": intervals}, "predictions": {"model": files}, "unavailable": {}}
    write_json(run / "result.json", result | {"data_fingerprint": fingerprint})
    return run


def right(count: int, of: int = 400, start: int = 0) -> np.ndarray:
    """Of so many images, the `count` from `start` on are right."""
    places = np.arange(of)
    return (places >= start) & (places < start + count)


def registered(home: Path, model: Path, name: str = "ants", *evaluations: Path, uri: str | None = None, **keys) -> dict:
    """Register in this process, as a rank does, and return the result."""
    uri = uri or f"sqlite:///{home / 'mlflow.db'}"
    source = locate_model(str(model), tracking_uri=uri, home=home)
    config = RegisterConfig(
        model=str(model), name=name, tracking_uri=uri, evaluations=tuple(map(str, evaluations)), **keys
    )
    number = len(list((home / "runs").glob("register-*"))) + 1
    run = RunDirectory(home / "runs" / f"register-{number:03d}")
    run.path.mkdir(parents=True)
    run.config_file.write_text(dump_config(config))
    write_json(run.plan_file, {"stage": "register", "source": source.as_dict(), "home": str(home)})
    register(Rank(run, run.attempt(1).make(), 0, 0, 1))
    return read_json(run.result_file)


def forget(*paths: Path) -> None:
    """As on another machine: what the version itself does not hold is not there."""
    for path in paths:
        shutil.rmtree(path)


def hf_of(home: Path, number: int | str = 1, name: str = "ants") -> Path:
    """Where the local store has the files of a version, to be damaged."""
    import mlflow

    uri = f"sqlite:///{home / 'mlflow.db'}"
    source = mlflow.MlflowClient(uri).get_model_version(name, str(number)).source.removeprefix("models:/")
    return home / "artifacts" / "models" / source / "artifacts" / "artifacts" / "hf"


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())

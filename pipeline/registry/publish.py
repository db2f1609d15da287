"""Registration: a trained checkpoint becomes a version in MLflow that anybody can pull."""

import importlib.metadata
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.config.stages import RegisterConfig, read_run_config
from pipeline.rank import Rank
from pipeline.registry.export import export_timm_directory
from pipeline.registry.gate import champion_verdict
from pipeline.registry.locate import ModelSource, same_checkpoint, source_from_dict
from pipeline.registry.tracking import experiment_id, with_key
from pipeline.registry.weights import load_model
from pipeline.run_directory import RunDirectory, read_json, write_json

SERVED_MODEL = Path(__file__).with_name("served_model.py")
REQUIREMENTS = ("mlflow", "torch", "torchvision", "timm", "safetensors", "numpy", "pillow")

log = logging.getLogger(__name__)


def register(me: Rank) -> None:
    """Export the model, log it in MLflow, register a version, and let the gate decide about `champion`."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING, format="%(asctime)s %(message)s")
    config, plan = read_run_config(me.run.path), me.run.plan()
    source = source_from_dict(plan["source"])
    me.phase = "export"
    evaluations, gate = _evaluations(config, source)
    model = load_model(source)
    me.phase = "register"
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "hf"
        export_timm_directory(model, source, directory, evaluations)
        width = model.num_classes or model.num_features  # scores, or pooled features
        version = _log_and_register(config, source, width, directory, evaluations, Path(plan["home"]))
    summary = _tag_and_promote(config, source, version, gate)
    write_json(me.run.result_file, {"format_version": 1, "stage": "register"} | summary)


def _evaluations(config: RegisterConfig, source: ModelSource) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics of this checkpoint from the evaluations' results, and the tags that the gate compares."""
    metrics: dict[str, float] = {}
    gate: dict[str, str] = {}
    for path in config.evaluations:
        run = RunDirectory(path)
        result, sources = read_json(run.result_file), run.plan()["sources"]
        for name, scored in sources.items():
            if not same_checkpoint(scored["lineage"], source.lineage):
                continue
            metrics |= result["metrics"][name]
            key = next(key for key in result["metrics"][name] if key.endswith("/top1"))
            gate = {
                "vit.gate_metric": key,
                "vit.gate_value": repr(result["metrics"][name][key]),
                "vit.gate_data": result["data_fingerprint"],
            }
    return metrics, gate


def _log_and_register(
    config: RegisterConfig, source: ModelSource, width: int, directory: Path, evaluations: dict[str, float], home: Path
) -> Any:
    # MLflow would otherwise pin every package of a surrounding project, and try a pip install to check them.
    os.environ |= {
        "MLFLOW_UV_AUTO_DETECT": "false",
        "MLFLOW_LOG_UV_FILES": "false",
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    mlflow.set_tracking_uri(config.tracking_uri)
    client = mlflow.MlflowClient()
    run_id = _run_of(client, config, source, home)
    with mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(SERVED_MODEL),
            artifacts={"hf": str(directory)},
            # Outputs only: an input signature would refuse lists, PIL images, bytes and paths.
            signature=ModelSignature(outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, width))])),
            pip_requirements=[f"{name}=={importlib.metadata.version(name)}" for name in REQUIREMENTS],
        )
        for key, value in evaluations.items():
            mlflow.log_metric(key, value, model_id=logged.model_id)
    client.set_terminated(run_id, "FINISHED")
    return mlflow.register_model(logged.model_uri, config.name, await_registration_for=60)


def _run_of(client: Any, config: RegisterConfig, source: ModelSource, home: Path) -> str:
    """The MLflow run of the training that made this checkpoint, or a new one where it left none here."""
    trained = source.lineage.get("run")
    if trained:
        key = RunDirectory(trained).key
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(ids, with_key(key), max_results=1)
        if found:
            return found[0].info.run_id
    experiment = experiment_id(client, "vit/register", config.tracking_uri, home)
    return client.create_run(experiment, run_name=config.name).info.run_id


def _git_commit(source: ModelSource) -> str | None:
    if "run" not in source.lineage:
        return None
    return (read_json(RunDirectory(source.lineage["run"]).provenance_file) or {}).get("code", {}).get("commit")


def _tag_and_promote(config: RegisterConfig, source: ModelSource, version: Any, gate: dict[str, str]) -> dict[str, Any]:
    import mlflow

    client = mlflow.MlflowClient()
    lineage = {f"vit.{key}": str(value) for key, value in source.lineage.items() if isinstance(value, str | int)}
    commit = _git_commit(source)
    tags = lineage | gate | ({"vit.git_commit": commit} if commit else {})
    for key, value in tags.items():
        client.set_model_version_tag(config.name, version.version, key, value)
    aliases = client.get_registered_model(config.name).aliases
    champion = client.get_model_version(config.name, aliases["champion"]).tags if "champion" in aliases else None
    decision = champion_verdict(gate, champion, config.promotion_margin)
    client.set_registered_model_alias(config.name, "candidate", version.version)
    if decision.promoted:
        client.set_registered_model_alias(config.name, "champion", version.version)
    client.set_model_version_tag(config.name, version.version, "vit.gate_decision", decision.reason)
    alias = "champion" if decision.promoted else "candidate"
    return {
        "uri": f"models:/{config.name}/{version.version}",
        "tracking_uri": config.tracking_uri,
        "name": config.name,
        "version": int(version.version),
        "promoted": decision.promoted,
        "reason": decision.reason,
        "summary": f"models:/{config.name}/{version.version} is {alias}: {decision.reason}",
    }

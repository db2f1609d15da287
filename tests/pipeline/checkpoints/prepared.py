"""Run directories that hold no more than a config and a plan: those of the checkpoint that is kept of format 1."""

import json
from pathlib import Path

import yaml

from pipeline.config.recipe import apply_overrides, parse_overrides, validate
from pipeline.config.training import PretrainConfig
from pipeline.run_directory import RunDirectory, write_json

SAVED = Path(__file__).parents[2] / "golden" / "checkpoint_format_1" / "step-00000004"


def prepared_run(path: Path, *settings: str) -> RunDirectory:
    """The run that wrote `SAVED`, or with `settings` another: 20 steps of 8 images."""
    manifest = json.loads((SAVED / "manifest.json").read_text())
    raw = {
        "stage": manifest["stage"], "encoder": manifest["encoder"], "objective": manifest["objective"],
        "optimizer": {"learning_rate": 1e-3}, "zero": {"stage": 1}, "global_batch_size": 8, "micro_batch_size": 4,
        "steps": 20, "data": {"sources": [{"path": str(path.parent)}]},
    }  # fmt: skip
    config = validate(PretrainConfig, apply_overrides(raw, parse_overrides(settings)), "--set")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    cooldown = int(config.optimizer.cooldown * config.global_batch_size)
    steps = {"samples": config.steps * 8, "steps": config.steps, "warmup_samples": 0, "cooldown_samples": cooldown}
    plan = {
        "num_classes": manifest["num_classes"], "data": {"fingerprint": manifest["data_fingerprint"]},
        "config_sha256": manifest["config_sha256"], "steps": steps, "ranks_per_node": 2, "accelerators_per_node": 0,
    }  # fmt: skip
    run = RunDirectory(path)
    write_json(run.plan_file, plan)
    return run

"""Homes with runs that are done, and ladders, as their files would be; what came of training is made up."""

import json
from pathlib import Path

import yaml

from pipeline.forecast.ladder import FOLDER, Ladder, Rung, Score
from pipeline.run_directory import RunDirectory, write_json

ACCURACY = Score("accuracy", "validation/accuracy", "its own head on `validation`", 0.9)
PLAN = {
    "world_size": 2, "accelerators_per_node": 0, "nodes": 1, "precision": "fp32", "parameters": 10_000,
    "training_flops_per_image": 1e8, "samples_per_epoch": 1000, "steps": {"steps": 100, "samples": 10_000},
    "batches": {"global_batch_size": 100}, "data": {"name": "birds", "fingerprint": "f" * 64}, "num_classes": 10,
}  # fmt: skip


def done(
    folder: Path, name: str, *, seconds: float, around: float = 12.0, kind: str = "local", **changes
) -> RunDirectory:
    """A run that is done: its training took `seconds`, and starting and ending `around`."""
    run = RunDirectory(folder / name)
    plan = PLAN | {key: value for key, value in changes.items() if key in PLAN}
    attempt = run.attempt(1).make()
    last = plan["steps"]["steps"]
    step = seconds / last
    lines = [{"step": n, "time": 1000.0 + around / 2 + n * step, "perf/last_step_seconds": step} for n in (1, 2, last)]
    attempt.ledger.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_json(attempt.heartbeat(0), {"started": 1000.0, "time": 1000.0 + around + seconds, "ranks": {"0": 1}})
    run.profile_file.write_text(yaml.safe_dump({"kind": kind} | changes.get("profile", {})))
    run.config_file.write_text(yaml.safe_dump({"stage": "pretrain", "objective": {"kind": "supervised"}}))
    write_json(run.plan_file, plan | ({"rehearsal": True} if changes.get("rehearsal") else {}))
    result = {"stage": "pretrain", "steps": last, "metrics": {}}
    write_json(run.result_file, result | {key: changes[key] for key in ("best", "forecast") if key in changes})
    return run


def ladder(
    home: Path, config_settings, values, *, name="digits-1", fingerprint="f" * 64, epochs=10.0, **more
) -> Ladder:
    """A ladder of two sizes and three slices that scored `values`; None is a rung that is not done."""
    shapes = [(samples, parameters) for parameters in (1000, 4000) for samples in (1000, 2000, 4000)]
    rungs = [
        Rung(f"rung-{number}", f"/nowhere/rung-{number}", *shape, value=value, count=2000 if value is not None else 0,
             why=None if value is not None else "a device fell off", curves=more.get("curves", [{}] * 6)[number])
        for number, (shape, value) in enumerate(zip(shapes, values, strict=True))
    ]  # fmt: skip
    made = Ladder(
        home / FOLDER / name, "pretrain_supervised_debug",
        {"name": "birds", "path": "/birds", "fingerprint": fingerprint},
        config_settings, epochs, ACCURACY, tuple(rungs),
    )  # fmt: skip
    made.directory.mkdir(parents=True)
    made.write({})
    return made

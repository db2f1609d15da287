"""A trained model as a directory in timm's own layout, which needs none of our code to load."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from timm.models._hub import save_for_hf
from torch import nn

from models.encoders.positions import write_out_axes
from models.encoders.timm_config import read_encoder
from pipeline.lineage.trail import Trail
from pipeline.registry.integrity import write_sums
from pipeline.registry.locate import ModelSource
from pipeline.shards.atomic import give_usual_rights


def export_timm_directory(
    model: nn.Module, source: ModelSource, directory: Path, evaluations: dict[str, float], card: str = ""
) -> str:
    """Write config.json, model.safetensors, README.md (the `card`), provenance.json, evaluation.json and SHA256SUMS of
    them all, whose own hash it returns.

    `timm.create_model("local-dir:DIRECTORY", pretrained=True)` gives the same module. A table of positions that two
    learned axes make is written out, as timm has it.
    """
    write_out_axes(model)
    encoder = read_encoder(source.encoder)
    if source.encoder.get("positions") == "learned2d":
        source = replace(source, encoder=source.encoder | {"positions": "learned"})
    data = {
        "input_size": (encoder.channels, *encoder.input_size),
        "mean": tuple(source.mean),
        "std": tuple(source.std),
        "interpolation": "bicubic",
        "crop_pct": source.evaluation_crop,
        "crop_mode": source.evaluation_crop_mode,
        "fixed_input_size": True,
    }
    own: dict[str, Any] = {
        "pretrained_cfg": data,
        "vit": {"encoder": source.encoder, "objective": source.objective, "lineage": source.lineage,
                "outputs": source.outputs},
    }  # fmt: skip
    if source.classes:
        own["label_names"] = list(source.classes)
    save_for_hf(model, str(directory), model_config=own, safe_serialization=True)
    give_usual_rights(directory / "model.safetensors")
    (directory / "evaluation.json").write_text(json.dumps(evaluations, indent=2) + "\n")
    (directory / "provenance.json").write_text(json.dumps(_provenance(source), indent=2) + "\n")
    (directory / "README.md").write_text(card or f"# {encoder.name}\n")
    return write_sums(directory)


def _provenance(source: ModelSource) -> dict[str, Any]:
    run = source.lineage.get("run")
    path = Path(run) / "provenance.json" if run else None
    recorded = json.loads(path.read_text()) if path and path.is_file() else {}
    # What `vit explain` tells when the run, its parents or their datasets are gone, or on another machine.
    return {"lineage": source.lineage, "run": recorded, "trail": Trail().of(source)}

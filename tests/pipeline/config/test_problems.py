"""Every key of every config under values that make no sense: one line that a person understands, or a valid config."""

import math
import re

import pytest
import yaml
from pydantic import BaseModel

from cluster.profile import LocalProfile
from pipeline.config.evaluation import EvaluateConfig
from pipeline.config.ingest import IngestConfig
from pipeline.config.plan import count_parameters, plan_batches, plan_steps, training_flops
from pipeline.config.problems import config_classes, kind_of
from pipeline.config.recipe import read_yaml, recipe_path, resolve, validate
from pipeline.config.stages import RegisterConfig, SequenceConfig
from pipeline.config.training import FinetuneConfig, PretrainConfig, TrainingConfig
from pipeline.errors import InputError

NONSENSE = [
    ".inf", "-.inf", ".nan", "-1", "0", "0.5", "1", "1.0", "true", "''", "word", "null", "2023-01-01",
    "1.0e+308", "-1.0e+308", "1.0e-320", "1000000000000", "1.0e+12", "99999999999999999999", "-99999999999999999999",
    "[]", "[0]", "[1]", "[0, 0, 0]", "[.nan, .nan]", "[2, 1]", "[[1, 2]]", "[word, word]",
    "{}", "{a: 1}", "{kind: word}", "{kind: []}", "ftp://host/path", "s3://user:secret@bucket/path",
]  # fmt: skip
PYDANTIC = re.compile(
    r"Input should|Input tag|constrained|whole file|Field required|Extra inputs|Value error|valid \w+ty"
)


def recipe(name: str, **keys) -> dict:
    return read_yaml(recipe_path(name)) | keys


CONFIGS = {
    "mae": (PretrainConfig, recipe("pretrain_mae_debug")),
    "supervised": (PretrainConfig, recipe("pretrain_supervised_debug")),
    "lars": (
        PretrainConfig,
        recipe("pretrain_supervised_debug", optimizer={"kind": "lars", "learning_rate": 1}, zero={"stage": 0}),
    ),
    "finetune": (FinetuneConfig, recipe("finetune_vit", encoder={"name": "vit_b16"}, initialise_from="a")),
    "evaluate": (
        EvaluateConfig,
        {"models": {"a": "b"}, "datasets": {"d": {"path": "c", "protocols": ["classify-v1"]}}},
    ),
    "register": (RegisterConfig, {"model": "a", "name": "b", "tracking_uri": "c"}),
    "sequence": (SequenceConfig, {"runs": ["a"]}),
    "ingest": (IngestConfig, {}),
    "profile": (LocalProfile, {"kind": "local"}),
}


def keys_of(config_class: type[BaseModel], raw: dict, prefix: str = "") -> list[str]:
    """Every dotted key that may be set, of the kinds that `raw` chose."""
    keys = []
    for name, field in config_class.model_fields.items():
        keys.append(f"{prefix}{name}")
        below = raw.get(name) if isinstance(raw.get(name), dict) else {}
        inner = config_classes(field.annotation)
        chosen = next((one for one in inner if kind_of(one) == below.get("kind")), inner[0] if inner else None)
        if chosen and chosen.__name__ != "Source":
            keys += keys_of(chosen, below, f"{prefix}{name}.")
    return keys


@pytest.mark.parametrize(("config_class", "raw"), CONFIGS.values(), ids=CONFIGS)
def test_a_value_without_sense_is_a_line_that_names_its_key_or_a_valid_config(config_class, raw):
    keys = keys_of(config_class, raw)
    assert {key.rpartition(".")[2] for key in keys} >= set(config_class.model_fields)
    for key in keys:
        for text in NONSENSE:
            value = yaml.safe_load(text)
            try:
                config, _ = resolve(config_class, raw, {key: value}, "recipe.yaml")
                assert (
                    validate(config_class, yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), "") == config
                )
                if isinstance(config, TrainingConfig):
                    require_plannable(config)
            except InputError as error:
                for line in error.problems:
                    assert "\n" not in line and not PYDANTIC.search(line) and len(line) < 450, (key, text, line)
                    assert "secret" not in line or key != "checkpoint.mirror"
                    assert key.rpartition(".")[2] in line or f"--set {key}" in line, (key, text, line)


def require_plannable(config: TrainingConfig) -> None:
    batches = plan_batches(config.global_batch_size, config.micro_batch_size, 1)
    steps = plan_steps(config, 1000)
    assert batches.gradient_accumulation_steps >= 1 and 1 <= steps.steps <= steps.samples < 2**63
    assert count_parameters(config.encoder, config.objective, 10) > 0
    assert math.isfinite(training_flops(config.encoder, config.objective, 10))

"""Encoders whose positions are not a plain parameter, on the real engine under ZeRO-3, whose weights are in parts."""

import pytest

from pipeline.config.recipe import apply_overrides, validate
from pipeline.config.training import PretrainConfig
from tests.pipeline.training.engine_cases import config_of, saved_weights, train_on_engine, train_plainly
from tests.ranks import run_on_ranks

SETTINGS = [
    {"encoder.positions": "learned2d", "encoder.dropout": 0.2},
    {"encoder.positions": "relative_shared"},
    {"encoder.positions": "rotary", "encoder.register_tokens": 2, "encoder.layer_scale": 0.1},
]
STEPS = 3
pytestmark = pytest.mark.slow


def with_settings(stage: int, micro_batch: int, settings: dict) -> PretrainConfig:
    raw = config_of(stage, micro_batch=micro_batch).model_dump()
    return validate(PretrainConfig, apply_overrides(raw, settings), "settings")


def test_partitioned_positions_train_as_whole_ones_do(tmp_path):
    folders = [str(tmp_path / str(number)) for number in range(len(SETTINGS))]
    run_on_ranks(train_all, 2, [with_settings(3, 4, settings) for settings in SETTINGS], folders)
    for settings, folder in zip(SETTINGS, folders, strict=True):
        _, expected = train_plainly(with_settings(0, 8, settings), STEPS)
        weights = saved_weights(folder)
        assert weights.keys() == expected.keys()
        assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 5e-6, settings


def train_all(configs: list[PretrainConfig], folders: list[str]) -> None:
    for config, folder in zip(configs, folders, strict=True):
        train_on_engine(config, STEPS, folder)

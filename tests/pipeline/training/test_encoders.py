"""Encoders that are more than a plain ViT, on the real engine under ZeRO-3, whose weights are in parts."""

import pytest

from pipeline.config.recipe import apply_overrides, validate
from pipeline.config.training import PretrainConfig
from tests.pipeline.training.engine_cases import config_of, saved_weights, train_on_engine, train_plainly
from tests.ranks import run_on_ranks

SETTINGS = [
    {"encoder.positions": "learned2d", "encoder.dropout": 0.2},
    {"encoder.positions": "relative_shared"},
    {"encoder.positions": "rotary", "encoder.register_tokens": 2, "encoder.layer_scale": 0.1},
    {"encoder": {"name": "timm:swin_tiny_patch4_window7_224", "image_size": 16, "arguments": {
        "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}}},
]  # fmt: skip
WITH_STATISTICS = {"encoder": {"name": "timm:test_efficientnet", "image_size": 16}}  # of its BatchNorms
STEPS = 3
pytestmark = pytest.mark.slow


def with_settings(stage: int, micro_batch: int, settings: dict) -> PretrainConfig:
    raw = config_of(stage, micro_batch=micro_batch).model_dump()
    return validate(PretrainConfig, apply_overrides(raw, settings), "settings")


def test_partitioned_weights_train_as_whole_ones_do_and_statistics_are_saved(tmp_path):
    every = [*SETTINGS, WITH_STATISTICS]
    folders = [str(tmp_path / str(number)) for number in range(len(every))]
    run_on_ranks(train_all, 2, [with_settings(3, 4, settings) for settings in every], folders)
    assert saved_weights(folders.pop())["encoder.bn1.num_batches_tracked"] == STEPS
    for settings, folder in zip(SETTINGS, folders, strict=True):
        _, expected = train_plainly(with_settings(0, 8, settings), STEPS)
        weights = saved_weights(folder)
        assert weights.keys() == expected.keys()
        assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 5e-6, settings


def train_all(configs: list[PretrainConfig], folders: list[str]) -> None:
    for config, folder in zip(configs, folders, strict=True):
        train_on_engine(config, STEPS, folder)

"""What a MODEL is, and a mirror that loses and doubles nothing."""

import json
import time

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from models.build import build_network
from models.encoders.config import EncoderConfig
from models.encoders.timm_config import read_encoder
from models.encoders.vit import build_encoder
from pipeline.errors import InputError
from pipeline.registry.export import export_timm_directory
from pipeline.registry.locate import ModelSource, locate_model, source_from_dict, unregistrable
from pipeline.registry.tracking import Mirror
from pipeline.registry.weights import load_model, source_weights
from pipeline.run_directory import RunDirectory
from pipeline.views.evaluation import evaluation_view
from tests.pipeline.pictures import encoded, picture

SMALL = {"name": "vit_ti16", "image_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}


def exported(directory, num_classes: int = 3, crop_mode: str = "center", **encoder) -> ModelSource:
    config = EncoderConfig(**SMALL | encoder, pooling="mean")
    source = ModelSource(
        "x", "checkpoint", "x", encoder=config.model_dump(), num_classes=num_classes,
        classes=tuple("abc")[:num_classes], mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), evaluation_crop=1.0,
        evaluation_crop_mode=crop_mode, objective="supervised",
    )  # fmt: skip
    export_timm_directory(build_encoder(config, num_classes), source, directory, {"eval/x/top1": 0.5})
    return source


@pytest.mark.parametrize("num_classes", [3, 0])
def test_an_exported_directory_is_located_and_loads_as_it_was(tmp_path, num_classes):
    exported(tmp_path / "hf", num_classes)
    source = locate_model(str(tmp_path / "hf"), tracking_uri="", home=tmp_path)
    assert (source.num_classes, source.mean, source.evaluation_crop) == (num_classes, (0.1, 0.2, 0.3), 1.0)
    assert EncoderConfig.model_validate(source.encoder) == EncoderConfig(**SMALL, pooling="mean")
    assert source_from_dict(json.loads(json.dumps(source.as_dict()))) == source
    model = load_model(source)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in source_weights(source).items())


@pytest.mark.parametrize("positions", ["learned2d", "relative_shared", "rotary"])
def test_a_model_with_any_positions_loads_with_timm_alone_and_is_located_again(tmp_path, positions):
    torch.manual_seed(0)
    exported(tmp_path / "hf", positions=positions)
    source = locate_model(str(tmp_path / "hf"), tracking_uri="", home=tmp_path)
    ours, images = load_model(source), torch.randn(2, 3, 16, 16)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    assert torch.equal(ours.forward_features(images), theirs.forward_features(images))
    assert EncoderConfig.model_validate(source.encoder).positions == positions.replace("learned2d", "learned")


def test_a_network_that_is_no_plain_vit_is_exported_and_located_and_gives_what_it_gave(tmp_path):
    raw = {
        "name": "timm:convnext_atto",
        "image_size": 32,
        "arguments": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    }
    config = read_encoder(raw)
    source = ModelSource("x", "checkpoint", "x", encoder=config.model_dump(), num_classes=3, classes=("a", "b", "c"),
                         mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), objective="supervised")  # fmt: skip
    model, images = build_network(config, 3).eval(), torch.randn(2, 3, 32, 32)
    torch.nn.init.normal_(model.head.fc.weight)
    assert unregistrable(source) is None
    export_timm_directory(model, source, tmp_path / "hf", {})
    located = locate_model(str(tmp_path / "hf"), tracking_uri="", home=tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    for other in (theirs, load_model(located)):
        assert torch.equal(other(images), model(images))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    del written["vit"]  # as timm itself would have written it
    (tmp_path / "hf" / "config.json").write_text(json.dumps(written))
    assert torch.equal(
        load_model(locate_model(str(tmp_path / "hf"), tracking_uri="", home=tmp_path))(images), model(images)
    )


def test_a_swin_without_a_head_is_exported_and_gives_pooled_features(tmp_path):
    arguments = {"window_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    config = read_encoder({"name": "timm:swin_tiny_patch4_window7_224", "image_size": 32, "arguments": arguments})
    source = ModelSource("x", "checkpoint", "x", encoder=config.model_dump(), num_classes=0, mean=(0.1, 0.2, 0.3),
                         std=(0.5, 0.5, 0.5), objective="simmim")  # fmt: skip
    model, images = build_network(config).eval(), torch.randn(2, 3, 32, 32)
    export_timm_directory(model, source, tmp_path / "hf", {})
    located = locate_model(str(tmp_path / "hf"), tracking_uri="", home=tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    assert theirs(images).shape == (2, theirs.num_features) == (2, 32)
    for other in (theirs, load_model(located)):
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize(
    "options", [{}, {"reg_tokens": 2, "act_layer": "gelu_tanh"}, {"no_embed_class": True}], ids=str
)
def test_a_directory_of_timms_own_is_the_network_that_timm_builds_from_it(tmp_path, options):
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3} | options
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments).eval()
    timm.models._hub.save_for_hf(theirs, str(tmp_path / "hf"), safe_serialization=True)
    ours, images = (
        load_model(locate_model(str(tmp_path / "hf"), tracking_uri="", home=tmp_path)),
        torch.randn(2, 3, 16, 16),
    )
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize(
    ("encoder", "words"),
    [({"representation": True}, "no tanh representation head"), ({"norm_eps": 1e-12}, "LayerNorm eps 1e-06 and 1e-05")],
)
def test_a_model_that_timm_does_not_express_is_not_registered_and_the_reason_is_said(encoder, words):
    config = EncoderConfig(**SMALL | encoder)
    assert words in unregistrable(ModelSource("x", "checkpoint", "x", encoder=config.model_dump()))
    assert unregistrable(ModelSource("x", "checkpoint", "x", encoder=EncoderConfig(**SMALL).model_dump())) is None


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_an_exported_model_says_its_input_and_its_crop_as_timm_reads_them(tmp_path, crop_mode):
    exported(tmp_path / "hf", crop_mode=crop_mode, image_size=(16, 24))
    assert locate_model(str(tmp_path / "hf"), tracking_uri="", home=tmp_path).evaluation_crop_mode == crop_mode
    model = timm.create_model(f"local-dir:{tmp_path / 'hf'}", pretrained=True).eval()
    data = timm.data.resolve_data_config({}, model=model)
    assert (data["input_size"], data["crop_mode"], data["crop_pct"]) == ((3, 16, 24), crop_mode, 1.0)
    photo = picture(0, 60, 40)
    served = timm.data.create_transform(**data)(photo)
    out = np.empty((16, 24, 3), np.uint8)
    evaluation_view(encoded(photo, "PNG"), "png", out, crop=1.0, crop_mode=crop_mode, mean=data["mean"])
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(served, (torch.from_numpy(out).permute(2, 0, 1) / 255 - mean) / std, atol=1e-6)
    assert model(served[None]).shape == (1, 3)


def test_a_weights_file_with_a_pickle_that_runs_code_is_refused(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    source = locate_model(str(tmp_path / "evil.pth"), tracking_uri="", home=tmp_path)
    with pytest.raises(InputError, match="not readable as weights"):
        source_weights(source)
    assert not canary.exists()


def test_weights_files_are_read_and_what_is_missing_is_named(tmp_path):
    save_file(build_encoder(EncoderConfig(**SMALL)).state_dict(), tmp_path / "w.safetensors")
    assert "blocks.1.attn.qkv.weight" in source_weights(
        locate_model(str(tmp_path / "w.safetensors"), tracking_uri="", home=tmp_path)
    )
    with pytest.raises(InputError, match="does not exist"):
        locate_model(str(tmp_path / "none.safetensors"), tracking_uri="", home=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a run, a checkpoint"):
        locate_model(str(tmp_path / "empty"), tracking_uri="", home=tmp_path)


def test_a_tracking_server_that_does_not_answer_is_said_within_seconds(tmp_path):
    started = time.monotonic()
    with pytest.raises(InputError, match="does not answer"):
        locate_model("models:/x@champion", tracking_uri="http://127.0.0.1:9", home=tmp_path)
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_mirror_killed_between_sending_and_noting_doubles_no_point_and_an_earlier_step_is_not_sent_again(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.config_file.write_text("stage: pretrain\nsteps: 5\n")
    run.plan_file.write_text("{}")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def append(attempt: int, steps: range, torn: str = "") -> None:
        ledger = run.attempt(attempt).make().ledger
        with open(ledger, "a") as file:
            file.writelines(json.dumps({"step": s, "time": 1000.0 + s, "train/loss": 1 / s}) + "\n" for s in steps)
            file.write(torn)

    append(1, range(1, 6), torn='{"step": 6, "ti')
    Mirror(run, uri, tmp_path).forward()
    cursor = run.path / "forwarded.json"
    before = cursor.read_text()
    append(2, range(4, 9))  # resumed from step 3: steps 4 and 5 are done again
    Mirror(run, uri, tmp_path).forward()
    cursor.write_text(before)  # as if killed before the cursor was written
    mirror = Mirror(run, uri, tmp_path)
    mirror.finish("FINISHED")
    history = mirror.client.get_metric_history(mirror.run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 9))
    assert mirror.client.get_run(mirror.run_id).info.status == "FINISHED"

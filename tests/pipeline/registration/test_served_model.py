"""What a registered model takes and gives, loaded as anybody loads it; a real scoring server among them."""

import base64
import io
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image

from pipeline.ingestion.images import prepare_image
from pipeline.ports import free_port
from pipeline.registration.upload import SETTINGS, save_served_model
from pipeline.views.evaluation import evaluation_view
from tests.pipeline.registration.servers import process_on
from tests.pipeline.registration.stores import exported

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))


def png(image=IMAGE) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def saved(tmp_path: Path, **settings) -> Path:
    from mlflow.models import Model

    directory = exported(tmp_path / "hf", **settings)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in SETTINGS.items():
            environment.setenv(name, value)
        save_served_model(directory, tmp_path / "pyfunc", settings.get("num_classes", 3) or 48, Model())
    return tmp_path / "pyfunc"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mlflow.pyfunc.load_model(str(saved(tmp_path_factory.mktemp("model"))))


def test_who_loads_it_is_told_nothing_of_how_it_is_written(tmp_path, recwarn):
    mlflow.pyfunc.load_model(str(saved(tmp_path)))
    assert not [str(said.message) for said in recwarn if "type hint" in str(said.message)]


def test_every_form_of_an_image_gives_the_same_probabilities(model, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png())
    text, array = base64.b64encode(png()).decode(), np.array(IMAGE)
    forms = [
        [IMAGE], IMAGE, [array], array, array[None], [png()], png(), [path], [str(path)], str(path), path, [text],
        [f"data:image/png;base64,{text}"], {"image": [text]}, np.array([text]), pd.DataFrame({"image": [png()]}),
        pd.DataFrame({"x": [text]}), pd.DataFrame({"path": [str(path)]}), pd.DataFrame({"id": [1], "image": [text]}),
        pd.DataFrame({"pil": [IMAGE]}), pd.DataFrame([[text]]),
    ]  # fmt: skip
    expected = model.predict([IMAGE])
    assert expected.shape == (1, 3) and expected.dtype == np.float32 and np.isclose(expected.sum(), 1)
    for form in forms:
        assert np.array_equal(model.predict(form), expected), form
    assert model.predict([IMAGE, array, png()]).shape == (3, 3)
    assert model.predict([]).shape == model.predict(pd.DataFrame({"image": []})).shape == (0, 3)


def grown(mode: str) -> Image.Image:
    """An image of this mode whose meaning `.convert("RGB")` alone gets wrong, or may."""
    noise = np.random.default_rng(1)
    if mode == "I;16":
        return Image.fromarray(noise.integers(0, 65536, (40, 56), dtype=np.uint16))
    image = Image.fromarray(noise.integers(0, 256, (40, 56, 4), dtype=np.uint8), "RGBA")
    if mode == "P":
        image = image.convert("RGB").convert("P")
        image.info["transparency"] = bytes(range(256))
        return image
    return image.convert(mode)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16", "L"])
def test_a_file_is_served_as_the_dataset_that_holds_it_is_scored(model, mode, orientation):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    grown(mode).save(buffer, "PNG", exif=exif)
    stored = prepare_image(buffer.getvalue(), "rgb")
    view = np.empty((32, 32, 3), np.uint8)
    evaluation_view(stored.content, stored.extension, view, crop=1.0, crop_mode="center", mean=(0.5,) * 3)
    loaded = model.unwrap_python_model()
    with torch.no_grad():
        scored = loaded.module((torch.from_numpy(view.transpose(2, 0, 1).copy())[None] / 255 - 0.5) / 0.5).softmax(1)
    assert np.allclose(model.predict([buffer.getvalue()]), scored.numpy(), atol=1e-6)
    assert np.allclose(model.predict([Image.open(buffer)]), scored.numpy(), atol=1e-6)


def test_a_photo_that_lies_on_its_side_is_turned(model):
    upright = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to see it
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", exif=exif, quality=95)
    assert np.allclose(model.predict([buffer.getvalue()]), model.predict([upright]), atol=0.02)


def test_damaged_metadata_is_passed_over(model):
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG", exif=b"Exif\0\0XX\0*")
    assert np.allclose(model.predict([buffer.getvalue()]), model.predict([IMAGE]), atol=1e-6)


def test_what_is_no_image_is_said_in_a_line(model):
    for wrong, words in (
        (["no such file"], "neither a file on this machine nor base64"),
        ([3.5], "not float"),
        ([np.zeros((4, 4, 3))], "uint8, not"),
        ([Image.new("F", (4, 4))], "mode F has no agreed meaning"),
        ([Image.new("I", (4, 4), 70_000)], "beyond 16 bit"),
        (pd.DataFrame({"a": [1], "b": [2]}), "columns a, b"),
    ):
        with pytest.raises(Exception, match=words):
            model.predict(wrong)


def test_a_model_of_a_sigmoid_gives_sigmoids_and_one_without_a_head_features(tmp_path):
    path = saved(tmp_path / "sigmoid", outputs="sigmoid")
    loaded = mlflow.pyfunc.load_model(str(path))
    module, transform = (getattr(loaded.unwrap_python_model(), name) for name in ("module", "transform"))
    logits = module(transform(IMAGE)[None])
    assert np.allclose(loaded.predict([IMAGE]), logits.sigmoid().detach().numpy(), atol=1e-6)
    assert loaded.unwrap_python_model().classes == ["a", "b", "c"]
    headless = mlflow.pyfunc.load_model(str(saved(tmp_path / "headless", num_classes=0)))
    assert headless.predict([IMAGE]).shape == (1, 48)


def test_features_are_what_the_head_reads(model):
    loaded = model.unwrap_python_model()
    features = loaded.features([IMAGE, png()])
    assert features.shape == (2, 48) and features.dtype == np.float32 and np.array_equal(features[0], features[1])
    probabilities = loaded.module.head(torch.from_numpy(features)).softmax(1).detach().numpy()
    assert np.allclose(probabilities, model.predict([IMAGE, IMAGE]), atol=1e-6)
    assert loaded.features([]).shape == (0, 48)


def test_where_and_in_which_batches_it_computes_can_be_said(tmp_path, monkeypatch):
    path = str(saved(tmp_path))
    loaded = mlflow.pyfunc.load_model(path, model_config={"device": "cpu", "batch_size": 2})
    assert loaded.unwrap_python_model().batch_size == 2
    assert np.allclose(loaded.predict([IMAGE] * 5), mlflow.pyfunc.load_model(path).predict([IMAGE] * 5), atol=1e-6)
    loaded = mlflow.pyfunc.load_model(path, model_config={"device": "meta"})
    assert next(loaded.unwrap_python_model().module.parameters()).device.type == "meta"
    monkeypatch.setenv("MLFLOW_DEFAULT_PREDICTION_DEVICE", "meta")
    loaded = mlflow.pyfunc.load_model(path)
    assert next(loaded.unwrap_python_model().module.parameters()).device.type == "meta"
    if torch.cuda.is_available():
        on_gpu = mlflow.pyfunc.load_model(path, model_config={"device": "cuda"})
        assert on_gpu.predict([IMAGE]).shape == (1, 3)


def test_a_module_that_is_being_trained_goes_on_in_training_after_a_prediction_that_failed(model):
    module = model.unwrap_python_model().module
    module.train()
    try:
        with pytest.raises(RuntimeError), torch.no_grad():
            bias = module.head.bias
            module.head.bias = torch.nn.Parameter(torch.zeros(7))
            model.predict([IMAGE])
        assert module.training
    finally:
        module.head.bias = bias
        module.eval()


@pytest.mark.slow
def test_a_scoring_server_answers_requests_with_an_image(tmp_path):
    path, port = saved(tmp_path), free_port()
    arguments = ["mlflow", "models", "serve", "-m", str(path), "--env-manager", "local", "-h", "127.0.0.1"]
    text = base64.b64encode(png()).decode()
    requests = (
        {"dataframe_split": {"columns": ["image"], "data": [[text], [text]]}},
        {"dataframe_records": [{"image": text}, {"image": text}]},
        {"inputs": [text, text]},
        {"inputs": {"image": [text, text]}},
        {"instances": [text, text]},
    )
    expected = mlflow.pyfunc.load_model(str(path)).predict([IMAGE, IMAGE])
    with process_on(port, [*arguments, "-p", str(port), "--workers", "1"], tmp_path / "log", "/ping"):
        for body in requests:
            assert np.allclose(asked(port, body), expected, atol=1e-6), body
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(port, {"inputs": ["no image"]})
        assert refused.value.code in (400, 500) and "not base64 of an image" in refused.value.read().decode()
        photo = tmp_path / "private.png"
        photo.write_bytes(png())
        with pytest.raises(urllib.error.HTTPError) as refused:  # a file of the server's machine
            asked(port, {"inputs": [str(photo)]})
        assert "not base64 of an image" in refused.value.read().decode()


def asked(port: int, body: dict) -> np.ndarray:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return np.array(json.load(response)["predictions"])


CLEAN = """
import base64, io, sys
import mlflow, numpy as np, pandas as pd, timm, torch
from PIL import Image

for name in ("models", "pipeline", "flows", "cluster", "deepspeed", "prefect", "accelerate"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is here, so this proves nothing")
tracking, photo = sys.argv[1:]
mlflow.set_tracking_uri(tracking)
model = mlflow.pyfunc.load_model("models:/ants@champion")
content = open(photo, "rb").read()
image = Image.open(photo).convert("RGB")
text = base64.b64encode(content).decode()
forms = [[image], [np.array(image)], [content], [photo], [text], pd.DataFrame({"image": [text]}),
         pd.DataFrame({"image": [content]}), pd.DataFrame({"path": [photo]})]
rows = [model.predict(form) for form in forms]
assert all(np.array_equal(row, rows[0]) for row in rows) and rows[0].shape == (1, 3)

module = model.unwrap_python_model().module
folder = mlflow.artifacts.download_artifacts("models:/ants@champion")
alone = timm.create_model("local-dir:" + folder + "/artifacts/hf", pretrained=True).eval()
x = torch.randn(4, 3, 32, 32)
assert torch.equal(module(x), alone(x))

module.train()
optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
losses = []
for _ in range(5):
    loss = torch.nn.functional.cross_entropy(module(x), torch.tensor([0, 1, 2, 0]))
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print("fine-tuned further:", losses[0], "->", losses[-1])
"""


@pytest.mark.slow
def test_an_environment_with_only_mlflow_torch_and_timm_loads_it_in_every_way(store, tmp_path):
    from importlib.metadata import version

    from tests.pipeline.registration.stores import registered

    registered(store, exported(tmp_path / "hf"))
    (tmp_path / "photo.png").write_bytes(png())
    python = tmp_path / "clean" / "bin" / "python"
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in ("mlflow", "torch", "timm", "torchvision")]
    for command in (["venv", "-q", str(tmp_path / "clean"), "-p", sys.executable],
                    ["pip", "install", "-q", "-p", str(python), "--link-mode", "hardlink", *pins]):  # fmt: skip
        done = subprocess.run(["uv", *command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL", "MLF"))
    }
    environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python), "-c", CLEAN, f"sqlite:///{store / 'mlflow.db'}", str(tmp_path / "photo.png")],
        env=environment, cwd="/", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fine-tuned further" in done.stdout


def test_timm_alone_loads_the_files(tmp_path):
    path = saved(tmp_path)
    alone = timm.create_model(f"local-dir:{path}/artifacts/hf", pretrained=True).eval()
    module = mlflow.pyfunc.load_model(str(path)).unwrap_python_model().module
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(alone(x), module(x))

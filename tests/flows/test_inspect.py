"""`vit inspect`: what it looks at, what it draws of which model, and what it refuses before and after it has begun."""

import numpy as np
import pytest
from PIL import Image

from flows.requests.evaluation import evaluation_run
from flows.requests.inspection import inspection_run
from flows.requests.registration import registration_run
from models.encoders.config import EncoderConfig
from models.encoders.vit import build_encoder
from pipeline.config.ingest import IngestConfig
from pipeline.errors import InputError
from pipeline.evaluation.single_images import file_samples
from pipeline.ingestion.build import ingest
from pipeline.inspection.images import covered_pixels, read_mask
from pipeline.inspection.pictures import WORDS, inspect
from pipeline.inspection.sources import image_files, spread
from pipeline.rank import Rank
from pipeline.registry.export import export_timm_directory
from pipeline.registry.locate import ModelSource
from pipeline.run_directory import read_json, write_json


def source_of(**encoder) -> ModelSource:
    small = {"name": "vit_ti16", "image_size": (16, 24), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return ModelSource(
        "x", "checkpoint", "x", encoder=EncoderConfig(**small | encoder).model_dump(), mean=(0.5,) * 3, std=(0.2,) * 3,
        evaluation_crop=1.0, objective="mae", lineage={"step": 7},
    )  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """An exported encoder."""
    source = source_of()
    export_timm_directory(build_encoder(EncoderConfig(**source.encoder)), source, tmp_path / "model", {})
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path):
    """Three pictures and a file that is none, in two folders."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "more/c.png"):
        pixels = generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def request(model, images, destination, home, *settings):
    return inspection_run(str(model), [str(path) for path in images], str(destination),
                                   overrides=settings, home=home)  # fmt: skip


def inspected(model, images, destination, home, *settings) -> dict:
    """The result of the stage in this process."""
    run = request(model, images, destination, home, *settings)
    inspect(Rank(run, run.attempt(1).make(), 0, 0, 1))
    return read_json(run.result_file)


def test_an_encoder_alone_gets_every_picture_but_reconstructions_and_the_page_says_why(model, photos, tmp_path, home):
    result = inspected(model, [photos], tmp_path / "pictures", home)
    assert result["pictures"] == [name for name in WORDS if name not in ("reconstructions.png", "filled-in.png")]
    assert "objective mae has the decoder" in result["not_drawn"]["Masked reconstructions"]
    assert result["images"] == ["a.png", "b.jpg", "c.png"] and "holds no run of this model" in result["tracking"]
    page = (tmp_path / "pictures/index.html").read_text()
    for name in result["pictures"]:
        assert f'src="{name}"' in page and WORDS[name][1].replace("'", "&#x27;") in page
        assert Image.open(tmp_path / "pictures" / name).width > 300
    assert "Not drawn" in page and "step 7" in page


def test_an_inspection_replaces_an_earlier_one_and_nothing_else(model, photos, tmp_path, home):
    pictures = tmp_path / "pictures"
    inspected(model, [photos / "a.png"], pictures, home)
    (pictures / "reconstructions.png").write_text("of an earlier inspection")
    (pictures / "mine.txt").write_text("mine")
    result = inspected(model, [photos / "b.jpg"], pictures, home)
    assert {path.name for path in pictures.iterdir()} == {*result["pictures"], "index.html", "mine.txt"}
    with pytest.raises(InputError, match="not empty and holds no earlier inspection"):
        request(model, [photos], photos, home)


@pytest.mark.parametrize(
    ("images", "destination", "settings", "words"),
    [
        (["photos"], "photos/notes.txt", [], "photos/notes.txt` is a file"),
        (["photos/*.gif"], "new", [], "photos/\\*.gif`: there is no such file"),
        (["model/nothing"], "new", [], "nothing`: there is no such file, folder or dataset"),
        (["empty"], "new", [], "empty`: holds no image"),
        (["photos"], "new", ["split=test"], "split=test: only a dataset has splits"),
        (["photos"], "new", ["images=0"], "images: expected a whole number"),
        (["photos"], "new", ["mask=nowhere.png"], "mask=nowhere.png: there is no such file"),
        (["photos"], "new", ["mask={tmp}/photos/a.png"], "no decoder that fills in; name a run of objective mae"),
    ],
)
def test_what_cannot_be_inspected_is_said_before_anything_is_written(
    model, photos, tmp_path, home, images, destination, settings, words
):
    (tmp_path / "empty").mkdir()
    settings = [setting.format(tmp=tmp_path) for setting in settings]
    with pytest.raises(InputError, match=words) as error:
        request(model, [tmp_path / path for path in images], tmp_path / destination, home, *settings)
    assert len(error.value.problems) == 1 and not (home / "runs").exists() and not (tmp_path / "new").exists()


def test_a_network_that_is_no_plain_vit_is_refused_by_its_name(photos, tmp_path, home):
    (tmp_path / "network").mkdir()
    (tmp_path / "network/model.safetensors").touch()
    write_json(tmp_path / "network/config.json", {
        "architecture": "resnet10t", "pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.2] * 3},
    })  # fmt: skip
    with pytest.raises(InputError, match="plain ViT's patches and their attention, and its network is timm:resnet10t"):
        request(tmp_path / "network", [photos], tmp_path / "new", home)
    assert not (home / "runs").exists()


@pytest.mark.parametrize("request_of", [
    lambda model, photos, home: request(model, [photos], home / "new", home),
    lambda model, photos, home: registration_run(model, "name", home=home),
    lambda model, photos, home: evaluation_run(
        {"it": model}, data=str(home / "data"), protocols=(), profile="local", overrides=(), run_dir=None, home=home
    ),
], ids=["inspect", "register", "evaluate"])  # fmt: skip
def test_a_model_that_does_not_say_how_its_images_were_normalised_is_refused(request_of, photos, tmp_path, home):
    (tmp_path / "network").mkdir()
    (tmp_path / "network/model.safetensors").touch()
    write_json(tmp_path / "network/config.json", {"architecture": "vit_tiny_patch16_224", "num_classes": 2})
    ingest(str(photos), home / "data", IngestConfig())
    with pytest.raises(InputError, match="does not say how its images were normalised; "):
        request_of(str(tmp_path / "network"), photos, home)
    assert not (home / "runs").exists()


def test_an_image_that_cannot_be_read_or_has_other_channels_is_named(photos):
    with pytest.raises(InputError, match="notes.txt`: cannot be read as an image"):
        file_samples([str(photos / "notes.txt")], 3, named="IMAGES")


def test_folders_globs_and_files_name_each_image_once_in_order(photos):
    named = image_files([str(photos / "more"), str(photos / "*.png"), str(photos / "**/*.png"), str(photos / "a.png")])
    assert [path.removeprefix(f"{photos}/") for path in named] == ["more/c.png", "a.png"]
    assert len(image_files([str(photos)])) == 3


def test_images_are_spread_over_all_there_are():
    assert spread(range(100), 4) == [0, 25, 50, 75] and spread(range(3), 8) == [0, 1, 2]


def test_a_mask_is_stretched_over_the_image_and_cropped_with_it(photos, tmp_path):
    pixels = np.zeros((10, 10), np.uint8)
    pixels[:, 5:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    sample = file_samples([str(photos / "a.png")], 3, named="IMAGES")[0]  # 30 x 20, as the input's 24 x 16
    covered = covered_pixels(read_mask(str(tmp_path / "mask.png")), sample, source_of())
    assert covered.shape == (16, 24) and covered[:, 13:].all() and not covered[:, :11].any()
    square = covered_pixels(read_mask(str(tmp_path / "mask.png")), sample, source_of(image_size=16))
    assert square.shape == (16, 16) and square[:, 9:].all() and not square[:, :7].any()


def test_what_is_transparent_in_a_mask_covers_nothing(tmp_path):
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[:2, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert np.asarray(read_mask(str(tmp_path / "mask.png")))[:, 0].tolist() == [0, 0, 255, 255]

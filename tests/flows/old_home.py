"""A home of every format, small enough to keep: `python -m tests.flows.old_home` makes `tests/golden/home_N` anew.

It is kept so that today's commands are held to what earlier ones wrote. One that is there is never made again: a new
format gets a directory beside it. Paths in it begin with `PLACE`, which a test replaces by where its copy lies.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from pipeline.registry.integrity import write_sums

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PLACE = "/last-months-home"
NUMBER = 1
TEXT = (".json", ".jsonl", ".yaml", ".md", ".log", ".tsv")
RUN = "pretrain_supervised_debug-kept"
TINY = (
    "encoder.image_size=16", "encoder.patch_size=4", "encoder.embed_dim=12", "encoder.depth=1", "steps=4",
    "checkpoint.every_steps=4", "global_batch_size=8", "micro_batch_size=4", "profile.ranks_per_node=2",
    "profile.loader_workers=0", "data.record=true", "ema_decay=0.5",
)  # fmt: skip


def main() -> None:
    kept = GOLDEN / f"home_{NUMBER}"
    assert not kept.exists(), f"{kept} is kept for ever; give the new format a number of its own"
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        images = _images(Path(folder) / "images")
        run, data = home / "runs" / RUN, home / "data" / "digits"
        settings = [word for setting in TINY for word in ("--set", setting)]
        vit = [sys.executable, "-m", "flows"]
        for command in (
            ["ingest", str(images), str(data), "--set", "samples_per_shard=16"],
            ["pretrain", "pretrain_supervised_debug", "--data", str(data), "--run-dir", str(run), *settings],
            [
                "evaluate",
                str(run),
                "--data",
                str(data),
                "--run-dir",
                str(home / "runs" / "evaluation"),
                *settings[16:20],
            ],
            ["register", str(run), "--name", "digits"],
            ["embed", str(run), str(home / "embeddings"), "--data", str(data), *settings[16:20]],
        ):
            subprocess.run([*vit, *command, *(["--dir", str(home)] if command[0] != "ingest" else [])], check=True)
        (artifact,) = home.glob("artifacts/**/artifacts/hf")
        shutil.copytree(artifact.parents[1], home / "registered-model")
        for left in ("artifacts", "cache", "features", "logs", "runs/register-digits-001", "runs/embed-digits-001"):
            shutil.rmtree(home / left, ignore_errors=True)
        (home / "mlflow.db").unlink()  # MLflow's own, which has a way of its own to a new version: `mlflow db upgrade`
        for old, new in ((str(home), PLACE), (folder, "/source"), (str(ROOT), "/project")):
            with_paths(home, old, new)
        write_sums(home / "registered-model" / "artifacts" / "hf")
        shutil.copytree(home, kept)


def with_paths(home: Path, old: str, new: str) -> None:
    """Replace one folder's path by another in every text file below `home` that carries no checksum of itself."""
    for path in home.rglob("*"):
        if path.is_file() and path.suffix in TEXT and not path.is_relative_to(home / "data"):
            text = path.read_text()
            if old in text:
                path.write_text(text.replace(old, new))


def _images(folder: Path) -> Path:
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:40], digits.target[:40], strict=True)):
        if label < 3:
            path = folder / ("validation" if number > 25 else "train") / str(label) / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15.9).astype("uint8")).save(path)
    return folder


if __name__ == "__main__":
    main()

"""The notebook runs from its first cell to its last, in a kernel of its own, and ends in a model that works."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from sklearn.datasets import load_digits

TOUR = Path(__file__).with_name("tour.ipynb")
README = Path(__file__).parent.parent / "README.md"


def texts(notebook) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_tour_runs_and_its_model_can_be_loaded(home, monkeypatch):
    home.mkdir()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(TOUR, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()  # raises where a cell fails
    said = texts(notebook)
    assert "train 1442 images" in said and "models:/tour/1 is champion: first version" in said
    predicted, labels = (line.split() for line in re.search(r"predicted \[(.*)\] labels \[(.*)\]", said).groups())
    assert sum(one == other for one, other in zip(predicted, labels, strict=True)) >= 5, said
    assert "(8, 96)" in said and re.search(r"data +digits +fingerprint", said)
    for name, image in zip(("seven.png", "three.png"), load_digits().images[[7, 3]], strict=True):
        Image.fromarray((image * 15.9375).astype("uint8")).save(home / name)
    few_lines = re.search(r"```python\n(.*?)```", README.read_text(), re.S)[1]
    monkeypatch.chdir(home)
    made = {}
    exec(few_lines.replace("/home/you/.vit", str(home)).replace("digits@", "tour@"), made)
    assert made["probabilities"].shape == (2, 10) and made["features"].shape == (2, 96)


def test_the_tour_is_kept_with_what_it_shows():
    notebook = nbformat.read(TOUR, as_version=4)
    silent = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not cell.outputs]
    assert len(silent) == 1 and silent[0].startswith("import json")
    assert "Traceback" not in texts(notebook) and "Warning" not in texts(notebook)

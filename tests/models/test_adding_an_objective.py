"""README's section on adding an objective, followed to the letter on a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def written_in_the_readme() -> dict[str, str]:
    """The blocks of the section by the file that their first line names."""
    section = re.search(r"## Adding an objective\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)[1]
    return dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", section, re.S))


def insert(path: Path, text: str, before: str) -> None:
    old = path.read_text()
    assert old.count(before) == 1, f"{path.name} has {before!r} {old.count(before)} times"
    path.write_text(old.replace(before, text + before))


def follow(project: Path, blocks: dict[str, str]) -> None:
    config, module, build, cases, recipe = blocks
    insert(project / config, blocks[config] + "\n\n", before="ObjectiveConfig = Annotated[")
    union = (project / config).read_text()
    (project / config).write_text(re.sub(r"(ObjectiveConfig = Annotated\[\s*)", r"\1RotationConfig | ", union))
    (project / module).write_text(blocks[module])
    imports, case = blocks[build].split("\n\n")
    insert(project / build, imports + "\n", before="from models.objectives.supervised")
    insert(project / build, case, before="        case _:\n")
    insert(
        project / cases, "from models.objectives.config import RotationConfig\n", before="from models.objectives.batch"
    )
    written = (project / cases).read_text()
    (project / cases).write_text(written.replace("CASES = [\n", "CASES = [\n" + blocks[cases]))
    (project / recipe).write_text(blocks[recipe])


def test_the_steps_of_the_readme_make_an_objective_that_passes_every_proof(tmp_path):
    project = tmp_path / "project"
    for package in ("models", "pipeline", "flows", "cluster", "tests"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", project)
    follow(project, written_in_the_readme())
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/test_objectives.py",
         "tests/test_recipes.py", "-k", "rotation or every_kind"],
        cwd=project, env=os.environ | {"VIT_ACCEPT_GOLDEN": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 13
    assert '"pretrain_rotation_debug"' in (project / "tests/golden/losses.json").read_text()

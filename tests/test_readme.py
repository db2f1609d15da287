"""README is true: its commands parse, its recipes, deployments and links exist, its set-up is CI's."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from flows.cli import app
from pipeline.config.recipe import recipe_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every `vit ...` of the README, in code blocks and in the text."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("#")[0] for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:uv run )?vit [^`]+)`", README)
    lines = [re.sub(r"^.*?( -- |env( -u \w+)+ )(?=vit )", "", line) for line in lines]  # in a pod, or without variables
    found = {part.strip() for line in [*lines, *inline] for part in line.replace("\n", " ").split("&&")}
    return sorted(command for command in found if re.match(r"(uv run )?vit ", command))


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_parses(command):
    words = shlex.split(command.removeprefix("uv run ").removeprefix("vit ").replace("STEP", "7"))
    app.parse_args(words, exit_on_error=False, print_error=False)


def test_the_test_command_of_the_readme_is_what_ci_runs():
    assert "uv run pytest" in README and "uv run pytest" in (ROOT / ".ci/run").read_text()


def test_deployments_named_in_the_readme_are_those_of_the_deployment_file():
    deployments = yaml.safe_load((ROOT / "flows/prefect.yaml").read_text())["deployments"]
    names = {f"{d['entrypoint'].rpartition('.')[2]}/{d['name']}" for d in deployments}
    flows = "ingest|finetune|evaluate|register|lifecycle|sweep|ladder|study|reconcile"
    said = set(re.findall(rf"`((?:{flows})/\w+)`", README))
    said |= {f"pretrain/{encoder}" for encoder in re.search(r"pretrain/\{([^}]+)\}", README)[1].split(",")}
    assert said == names


def test_recipes_named_in_the_readme_exist():
    named = {f"pretrain_{o}_vit_{e}" for o in ("mae", "supervised") for e in ("s16", "b16", "l16", "h14")}
    named |= {f"pretrain_{o}_vit_{e}" for o in ("patch_colour", "simmim", "capi") for e in ("s16", "b16")}
    named |= {"pretrain_patch_colour_vit_l16", "pretrain_capi_vit_l14", "pretrain_distill_vit_s16"}
    assert (named | {"finetune_vit"}) <= set(recipe_names())
    for word in re.findall(r"\b(?:pretrain|finetune)_\w+", README.replace("pretrain_rotation_debug", "")):
        assert word in recipe_names(), word


def test_relative_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target

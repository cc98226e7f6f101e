"""What runs around the code: workflows call what exists, hooks fetch nothing, one version."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import unift

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict]:
    tree = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    return [step for job in tree["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_run_what_exists(workflow):
    """A script of the repository, or a target of the Makefile, for every value of the matrix."""
    tree = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        values = [m for job in tree["jobs"].values() for m in job["strategy"]["matrix"].get("target", [])]
        for value in values or [""]:
            words = command.replace("${{ matrix.target }}", value).split()
            assert (ROOT / words[0]).is_file() or (words[0] == "make" and words[1] in targets), command


def test_ci_runs_the_oldest_and_the_newest_python():
    tree = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = re.findall(r"Python :: (3\.\d+)", text)
    assert tree["jobs"]["checks"]["strategy"]["matrix"]["python"] == [known[0], known[-1]]
    assert f'requires-python = ">={known[0]}"' in text


def test_hooks_fetch_nothing():
    tree = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in tree["repos"]] == ["local"]
    hooks = tree["repos"][0]["hooks"]
    assert all(hook["language"] == "system" and hook["entry"].startswith(".venv/bin/") for hook in hooks)


def test_the_issue_template_asks_for_doctor():
    tree = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    asked = [part for part in tree["body"] if "unift doctor" in part["attributes"]["label"]]
    assert len(asked) == 1 and asked[0]["validations"]["required"]


def test_one_version():
    """The package's own, the installed distribution's and the newest of the changelog; releases have anchors."""
    assert metadata.version("unift") == unift.__version__
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"(?:<a id=\"([\w.-]+)\"></a>\n\n)?^## (.+)$", log, re.MULTILINE)
    assert titles and all(anchor for anchor, _ in titles)
    assert unift.__version__ in titles[0][1]

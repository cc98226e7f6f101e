"""Sdist and wheel: every file is in them, and the wheel works where it alone is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="hatchling, which builds the package, is missing: `make setup` installs it")

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unift"


def run(*command, **more):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel), made with the build backend that is installed."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def files() -> set[str]:
    """Of the package, below src/."""
    return {
        path.relative_to(ROOT / "src").as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_nothing_is_missing(built):
    sdist, wheel = built
    expected = files()
    kinds = {Path(name).suffix for name in expected}
    assert {".py", ".yaml", ".typed", ".safetensors", ".json", ".css"} <= kinds  # presets, models, the report's style
    packed = zipfile.ZipFile(wheel).namelist()
    assert {name for name in packed if name.startswith("unift/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in packed)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in expected} <= names
    assert {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "tests/conftest.py"} <= names
    assert not [name for name in names if name.startswith((".venv", "build/", "runs/"))]


def test_the_wheel_works(built, tmp_path):
    """A fresh environment with the wheel, and the dependencies of this one beside it."""
    python = tmp_path / "env" / "bin" / "python"
    venv.create(tmp_path / "env", with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", built[1])
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    more = {"cwd": tmp_path, "env": env}
    where = run(
        python, "-c", "import unift, importlib.metadata as m; print(unift.__file__, m.version('unift'))", **more
    )
    assert where.startswith(str(site)) and where.split()[1] == built[1].name.split("-")[1]
    command = tmp_path / "env" / "bin" / "unift"
    assert "schedule: cosine" in run(command, "show", "uft", **more)
    assert "lock" in run(command, "show", "--recipes", **more)
    assert "| uft |" in run(command, "methods", **more)
    run(command, "train", "--recipe", "lock", "train.steps=1", "data.test_rows=2", "--run", tmp_path / "run", **more)
    assert (tmp_path / "run" / "result.json").is_file()  # the embedded base came from the wheel

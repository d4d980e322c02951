"""What is installed is the whole package: every module, and the data files beside them."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import dllm_rl

ROOT = Path(__file__).parents[1]
FILES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "dllm_rl").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
DATA = {name for name in FILES if not name.endswith(".py")}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("TokenMeen", "TokenMean"), ("Recepie", "Recipe"), ("load_polic", "load_policy"), ("ppoclip", "PPOClip")],
)
def test_an_unknown_public_name_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(
        AttributeError, match=f"^module 'dllm_rl' has no attribute '{name}'; the nearest is '{nearest}'$"
    ):
        getattr(dllm_rl, name)


def test_every_data_file_is_named():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dllm_rl"]
    named = {path.relative_to(ROOT).as_posix() for each in patterns for path in (ROOT / "dllm_rl").glob(each)}
    assert named == DATA and len(DATA) > 1


def test_every_folder_of_modules_is_a_package():
    folders = {str(Path(name).parent) for name in FILES if name.endswith(".py")}
    assert {folder for folder in folders if f"{folder}/__init__.py" not in FILES} == set()


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    try:
        if int(version("setuptools").split(".")[0]) < 77:
            pytest.skip("setuptools is older than pyproject.toml asks for")
    except PackageNotFoundError:
        pytest.skip("setuptools is not installed")
    tree = tmp_path / "tree"  # a build leaves folders in the tree that it builds
    shutil.copytree(ROOT / "dllm_rl", tree / "dllm_rl", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "recipes").mkdir()
    (tree / "recipes" / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(tree)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel)
    assert {name for name in inside.namelist() if ".dist-info/" not in name} == FILES
    points = next(name for name in inside.namelist() if name.endswith("entry_points.txt"))
    assert b"dllm-rl = dllm_rl.cli.main:main" in inside.read(points)


def test_the_documents_speak_of_the_version_that_the_package_has():
    """The changelog's first section is of the package's own version, so that what is installed can be told from the
    last release."""
    present = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    (cited,) = re.findall(r"version = \{\{?(.+?)\}", (ROOT / "README.md").read_text())
    assert dllm_rl.__version__ == sections[0] == cited == present

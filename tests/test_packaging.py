"""The wheel holds what the code reads, and nothing else."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), "."]
    if importlib.util.find_spec("hatchling") is not None:
        command.append("--no-build-isolation")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    source = ROOT / "src"
    wanted = {str(f.relative_to(source)) for f in (source / "netwright").rglob("*") if f.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert "netwright/py.typed" in held
    assert held == wanted


def test_the_wheel_carries_licence_entry_point_and_requirements(wheel):
    (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()
    assert "netwright = netwright.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"Requires-Python: {PROJECT['requires-python']}" in metadata


def test_malicious_releases_are_excluded():
    from packaging.requirements import Requirement

    lightning = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "lightning")
    assert not lightning.specifier.contains("2.6.2")
    assert not lightning.specifier.contains("2.6.3")


def test_every_dependency_says_why():
    inside = False
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if line.startswith("dependencies = ["):
            inside = True
        elif line.startswith("]"):
            inside = False
        elif inside and line.strip():
            assert "#" in line, f"no reason beside {line.strip()}"


def test_version_is_stated_once():
    import netwright

    assert netwright.__version__ == PROJECT["version"] == importlib.metadata.version("netwright")
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {netwright.__version__}" in citation


def test_continuous_integration_calls_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    commands = [line for line in script.read_text().splitlines()[1:] if line.strip() and not line.startswith("#")]
    assert [c for c in commands if not c.startswith(("set ", "cd "))] == ["make test"]

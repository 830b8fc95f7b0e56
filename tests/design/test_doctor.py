import getpass
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from netwright.design import doctor as module
from netwright.design.doctor import PACKAGES, doctor


@pytest.fixture(scope="module")
def report():
    return doctor()


def test_versions_are_those_of_the_installed_packages(report):
    assert set(report.packages) == set(PACKAGES)
    assert report.packages["torch"] == importlib.metadata.version("torch")
    assert report.netwright == importlib.metadata.version("netwright")
    assert report.python.startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")


def test_it_reports_this_machine(report):
    assert report.cores == len(os.sched_getaffinity(0))
    assert report.threads == torch.get_num_threads()
    assert len(report.accelerators) >= torch.cuda.device_count()
    assert report.disk_free_gb > 0
    assert report.memory_gb > 0
    assert report.problems == ()


def test_it_is_json_and_a_table(report):
    assert (
        json.loads(json.dumps(report.to_dict(), allow_nan=False))["packages"]["torch"]
        == torch.__version__.split("+")[0]
    )
    lines = str(report).splitlines()
    assert lines[0].split() == ["part", "found"]
    assert lines[-1] == "no problems found"


def test_names_of_people_and_paths_only_when_asked(report):
    assert report.paths == {}
    full = doctor(full=True)
    assert full.paths["folder"] == os.getcwd()
    private = [str(Path.home()), os.getcwd(), str(Path(module.__file__).parent), os.environ["NETWRIGHT_CACHE"]]
    private += [getpass.getuser()] if getpass.getuser() != "root" else []
    for text in private:
        assert text not in str(report)
    assert os.getcwd() in str(full)


def test_what_is_missing_comes_with_the_line_that_installs_it(monkeypatch):
    real = module._version
    monkeypatch.setattr(module, "_version", lambda name: None if name in {"timm", "mlxtend", "onnx"} else real(name))
    report = doctor()
    assert report.extras["models"] == 'pip install "netwright[models]"'
    assert report.extras["data"] == 'pip install "netwright[data]"'
    assert report.data_sets["mnist-5000"] == 'pip install "netwright[data]"'
    assert report.data_sets["digits"] == "scikit-learn"
    assert report.packages["onnx"] is None
    assert report.problems == ("onnx is missing: pip install netwright",)
    assert "problem: onnx is missing" in str(report)


def test_extras_are_those_of_the_package(report):
    declared = set(importlib.metadata.metadata("netwright").get_all("Provides-Extra"))
    assert set(report.extras) == declared - {"dev", "docs", "bench"}


def test_data_sets_are_found_where_load_finds_them(report, tmp_path, monkeypatch):
    from netwright.data import names

    assert tuple(report.data_sets) == names()
    monkeypatch.setenv("NETWRIGHT_CACHE", str(tmp_path))
    assert "--download" in doctor().data_sets["cifar10"]
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    assert doctor().data_sets["cifar10"] == "data folder"


def test_a_malicious_release_is_a_problem(monkeypatch):
    real = module._version
    monkeypatch.setattr(module, "_version", lambda name: "2.6.2" if name == "lightning" else real(name))
    (problem,) = doctor().problems
    assert "2.6.2 was a malicious release" in problem


def test_read_only_places_and_a_full_disk_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(module.storage, "free_bytes", lambda path: 10_000_000)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NETWRIGHT_CACHE", str(tmp_path / "file" / "cache"))

    def refuse(**options):
        raise PermissionError

    report = doctor()
    assert not report.cache_writable
    assert report.folder_writable
    assert [p.split(" GB")[0] for p in report.problems] == ["only 0.01"]
    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    assert any("read-only" in problem for problem in doctor().problems)


def test_it_changes_nothing_and_never_imports_the_trainer(tmp_path):
    code = (
        "import sys\nfrom netwright.design.doctor import doctor\ndoctor(full=True)\n"
        "print([m for m in ('lightning', 'pytorch_lightning', 'timm', 'onnxruntime') if m in sys.modules])"
    )
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "NETWRIGHT_CACHE": str(tmp_path / "cache")}
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"
    assert [p for p in tmp_path.rglob("*") if p.is_file() or p.name == "cache"] == []

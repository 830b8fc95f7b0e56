"""Two processes that share the batch: the whole command, and a training step equal to that of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Command
from tiny_run import ARGUMENTS

from netwright.console import UserError
from netwright.data.tensors import Batches, Normalise, TensorImages
from netwright.design import distributed
from netwright.design.distributed import agree, barrier, is_main, launch, needs_launch, world_size
from netwright.nn.batchnorm import synchronise
from netwright.seeding import seeded, stream
from netwright.storage import read_json, read_tensors

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def images() -> TensorImages:
    generator = stream(0, "distributed")
    x = torch.randint(0, 256, (64, 1, 8, 8), generator=generator, dtype=torch.uint8)
    # A brightness that rises along the order: the two halves of a batch have different statistics.
    x = (x * torch.linspace(0.2, 1, 64).view(-1, 1, 1, 1)).to(torch.uint8)
    return TensorImages(x, torch.randint(0, 3, (64,), generator=generator))


def network(synchronised: bool) -> torch.nn.Module:
    from netwright.nn.convnet import SmallConvNet

    with seeded(0, "distributed"):
        made = SmallConvNet(num_classes=3, in_channels=1, grid=2)
    return synchronise(made) if synchronised else made


def train(devices: int, steps: int, synchronised: bool = True) -> dict[str, torch.Tensor]:
    """One epoch of so many steps on batches of 32, by as many processes; the state of the network after it."""
    from netwright.train import Classifier, fit

    torch.set_num_threads(1)
    made = network(synchronised)
    batches = Batches(images(), 32, seed=0, normalise=Normalise((0.5,), (0.25,)), steps=steps, shuffle=True)
    fit(
        Classifier(made, lr=0.05), batches, epochs=1, seed=0, devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )  # fmt: skip
    return {name: value.detach().clone() for name, value in made.state_dict().items()}


SCRIPT = """
import importlib.util, os, sys, torch
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
for name, synchronised in (("synchronised", True), ("apart", False)):
    torch.save(shared.train(2, 1, synchronised), f"{sys.argv[2]}/{name}-{os.environ['RANK']}.pt")
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(script), __file__, str(folder)),
        ],
        env={**ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parent.parent / "support")},
        capture_output=True, text=True, timeout=240, check=False, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder: Path, name: str, rank: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.slow
def test_a_training_step_equals_that_of_one_process(ranks: Path):
    alone = train(1, 1)
    start = {name: value for name, value in network(True).state_dict().items() if "num_batches" not in name}
    moved = {name: alone[name] for name in start}
    assert difference(start, moved) > 1e-3  # something was learnt
    assert difference(alone, read(ranks, "synchronised", 0)) < 1e-4
    assert difference(read(ranks, "synchronised", 0), read(ranks, "synchronised", 1)) == 0.0


@pytest.mark.slow
def test_without_common_batch_statistics_it_would_not(ranks: Path):
    """The test above tells something: processes that normalise their own halves come to other statistics."""
    assert difference(train(1, 1), read(ranks, "apart", 0)) > 1e-3


@pytest.mark.slow
def test_the_whole_command_with_two_processes(tmp_path: Path):
    folder = tmp_path / "run"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "netwright", "design", "digits", *ARGUMENTS, "--out", str(folder)),
            *("--devices", "2", "--strategy", "ddp", "--json"),
        ],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    content = json.loads(done.stdout)  # one document: only the first process speaks
    assert content["goal_met"] is True
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert len(list(folder.rglob("report.html"))) == 1
    assert not list(folder.rglob("*.part*")) + list(folder.rglob("*.saving")) + list(folder.rglob("*.ckpt"))
    assert read_json(folder / "run.json")["options"]["devices"] == 2
    assert read_json(folder / "measurements.json")["model"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    tensors = read_tensors(folder / "model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    # The same command, now by one process, finds everything done.
    with Command("design", "digits", *ARGUMENTS, "--out", str(folder), "--json") as again:
        assert again.wait(120) == 0, again.err[-2000:]
        assert json.loads(again.out)["accuracy"] == content["accuracy"]


@pytest.mark.slow
def test_bad_input_in_two_processes_is_one_message(tmp_path: Path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "netwright", "design", str(tmp_path / "nothing"), *ARGUMENTS),
            *("--out", str(tmp_path / "run"), "--devices", "2"),
        ],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert done.stderr.count("error: no such file or folder") == 1
    assert len(done.stderr.splitlines()) <= 6
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


class TestOneProcess:
    def test_is_a_world_of_its_own(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        assert (world_size(), is_main(), agree({"a": 1})) == (1, True, {"a": 1})
        barrier()
        assert not needs_launch(1, 1)
        assert needs_launch(2, 1)
        assert needs_launch(1, 2)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert not needs_launch(2, 1)

    def test_several_nodes_need_addresses(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
            monkeypatch.delenv(name, raising=False)
        with pytest.raises(UserError, match="--nodes 2 needs MASTER_ADDR, MASTER_PORT, NODE_RANK"):
            launch(1, 2, [])

    def test_launch_starts_the_command_once_a_process(self, monkeypatch: pytest.MonkeyPatch):
        started: list[tuple[list[str], dict[str, str]]] = []

        class Process:
            def __init__(self, command: list[str], env: dict[str, str], **_: object):
                started.append((command, env))
                self.returncode = 0

            def poll(self) -> int:
                return self.returncode

        monkeypatch.setattr(subprocess, "Popen", Process)
        assert launch(2, 1, ["design", "digits"]) == 0
        assert [command[1:] for command, _ in started] == [["-m", "netwright", "design", "digits"]] * 2
        assert [env["RANK"] for _, env in started] == ["0", "1"]
        assert {env["MASTER_ADDR"] for _, env in started} == {"127.0.0.1"}
        for name, value in (("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500"), ("NODE_RANK", "2")):
            monkeypatch.setenv(name, value)
        started.clear()
        launch(2, 3, ["design", "digits"])
        assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) for _, env in started] == [
            ("4", "0", "6"),
            ("5", "1", "6"),
        ]
        assert {(env["MASTER_ADDR"], env["MASTER_PORT"]) for _, env in started} == {("10.0.0.1", "29500")}

    @pytest.mark.parametrize(
        ("programs", "code", "told"),
        [
            (["0", "0"], 0, ""),
            (["1", "1"], 1, ""),
            (["2", "2"], 2, ""),
            (["130", "130"], 130, ""),
            (["2", "7"], 2, ""),
            (["0", "7"], 7, "from 1\n"),
            (["'hang'", "7"], 7, "from 1\n"),
            (["'hang'", "'killed'"], 2, "from 1\nerror: process 1 was ended by signal 9\n"),
        ],
    )
    def test_the_exit_code_of_a_run(self, monkeypatch, capsys, programs: list[str], code: int, told: str):
        """Of several processes; what the others say is shown when the first does not know what happened."""
        program = (
            "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
            "if rank: sys.stderr.write(f'from {rank}\\n')\n"
            "sys.stderr.flush()\nwhat = eval(sys.argv[1 + rank])\nif what == 'hang': time.sleep(60)\n"
            "if what == 'killed': os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(what)"
        )
        start = subprocess.Popen
        monkeypatch.setattr(distributed, "_GRACE", 0.3)
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", program, *command[3:]], **how)
        )
        assert launch(2, 1, programs) == code
        found = capsys.readouterr().err
        assert found.startswith(told) if told else found == ""

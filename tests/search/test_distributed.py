"""Two processes that share the batch do what one does with the whole of it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from forked import run_ranks

from netwright.data.tensors import Batches, TensorImages
from netwright.nn.batchnorm import synchronise
from netwright.search import spaces
from netwright.search.bilevel import average
from netwright.search.darts import DARTS
from netwright.search.dass import DASS, DASSStages
from netwright.search.rarts import RARTS
from netwright.search.self_distill import SDDARTS, SelfDistillation, SnapshotTeachers
from netwright.seeding import stream


def loaders(rank=0, world=1, steps=1):
    generator = stream(0, "images")
    x, y = torch.rand(16, 1, 8, 8, generator=generator), torch.randint(3, (16,), generator=generator)
    share = {"rank": rank, "world": world}
    return (
        Batches(TensorImages(x, y), 8, steps=steps, indexed=steps > 1, **share),
        Batches(TensorImages(x.flip(0), y.flip(0)), 8, name="validation", steps=steps, indexed=steps > 1, **share),
    )


def searcher(kind):
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
    supernet = synchronise(supernet)
    if kind == "dass":
        return DASS(supernet, 0.2, DASSStages(1, 1, 1))
    if kind.startswith("rarts"):
        return RARTS(supernet, epochs=1, alpha_lr=0.01, fused=kind == "rarts")
    if kind in ("state", "cache"):
        teachers = SnapshotTeachers(k=2, store=kind)
        return SDDARTS(supernet, SelfDistillation(lam=3.0, ramp=0.0, teachers=teachers), epochs=3, alpha_lr=0.01)
    return DARTS(supernet, order=int(kind[-1]), epochs=1, alpha_lr=0.01)


def state(kind, rank=0, world=1):
    found = searcher(kind)
    found.search(*loaders(rank, world, 2 if kind in ("state", "cache") else 1), seed=0)
    second = {f"y.{name}": y for name, y in getattr(found.method, "second", {}).items()}
    return (
        dict(found.supernet.state_dict())
        | detached(second)
        | {"train_loss": torch.tensor(found.result().epochs[0]["train_loss"])}
    )


def detached(tensors):
    return {name: tensor.detach() for name, tensor in tensors.items()}


def missing_gradients(rank, world):
    like = [torch.zeros(2), torch.zeros(1), torch.zeros(3)]
    grads = [torch.full((2,), float(rank + 1)), None, torch.ones(3) if rank == 0 else None]
    means, losses = average(grads, [torch.tensor(float(rank))], like=like)
    return {
        "first": means[0],
        "absent": torch.tensor(means[1] is None),
        "half": means[2],
        "loss": torch.tensor(losses[0]),
    }


def module(kind):
    from netwright.search.lightning import SearchModule  # seconds that the spawned processes of `work` need not spend

    return SearchModule(searcher(kind), *loaders(), seed=0)


KINDS = ("darts1", "darts2", "dass", "rarts", "rarts-exact", "state", "cache")


def work(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found = {kind: state(kind, rank, world) for kind in KINDS}
    found["missing"] = missing_gradients(rank, world)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(work, 2, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def difference(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(ranks, kind):
    alone = state(kind)
    start = dict(searcher(kind).supernet.state_dict())
    start = {name: value for name, value in start.items() if not name.endswith("num_batches_tracked")}
    assert difference(start, alone) > 1e-3  # something was learnt
    assert difference(alone, ranks[0][kind]) < 1e-4
    assert difference(ranks[0][kind], ranks[1][kind]) == 0.0


def test_missing_gradients_count_as_zero_unless_missing_everywhere(ranks):
    for found in (rank["missing"] for rank in ranks):
        assert found["first"].tolist() == [1.5, 1.5]
        assert found["absent"].item()
        assert found["half"].tolist() == [0.5, 0.5, 0.5]
        assert found["loss"].item() == 0.5


SCRIPT = """
import importlib.util, sys, lightning, torch
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
torch.set_num_threads(1)
module = shared.module("darts2")
trainer = lightning.Trainer(max_epochs=-1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[2])
trainer.fit(module)
trainer.save_checkpoint(f"{sys.argv[2]}/last.ckpt")
torch.save(dict(module.supernet.state_dict()), f"{sys.argv[2]}/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_lightning_ddp_equals_one_process(tmp_path):
    script = tmp_path / "fit.py"
    script.write_text(textwrap.dedent(SCRIPT))
    support = str(Path(__file__).parents[1] / "support")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": support}
    done = subprocess.run(
        [sys.executable, str(script), __file__, str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    alone = state("darts2")
    del alone["train_loss"]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert difference(alone, found[0]) < 1e-4
    assert difference(found[0], found[1]) == 0.0
    resumed = module("darts2")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    resumed.on_load_checkpoint(checkpoint)
    resumed.load_state_dict(checkpoint["state_dict"])
    assert resumed.searcher.finished
    assert difference(alone, dict(resumed.supernet.state_dict())) < 1e-4

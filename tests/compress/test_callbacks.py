import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from netwright.compress import prune
from netwright.compress.callbacks import GradualPruning, KeepSparse
from netwright.seeding import seeded, stream

STEPS = 5  # an epoch
TOTAL = 72 + 256

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, seed=0):
        super().__init__()
        with seeded(seed, "init"):
            self.network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 8))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)


class Recorder(lightning.Callback):
    def __init__(self):
        self.kept, self.masks = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.kept.append(prune.sparsity(pl_module).kept)
        self.masks.append(torch.cat([(pl_module.network[i].weight != 0).flatten() for i in (0, 3)]))


def fit(callbacks, epochs, module=None, ckpt_path=None, save=None):
    module = Module() if module is None else module
    x = torch.randn(4 * STEPS, 1, 4, 4, generator=stream(0, "x"))
    y = torch.randint(8, (4 * STEPS,), generator=stream(0, "y"))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        devices=1,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, trainer


def counts(schedule, steps):
    """Weights kept at the start of each step, by the definition."""
    kept, now = [], TOTAL
    for step in range(steps):
        if step >= schedule.end or (step >= schedule.begin and (step - schedule.begin) % schedule.every == 0):
            now = round(
                (1 - prune.cubic_sparsity(step, schedule.begin, schedule.end, schedule.initial_sparsity, 0.9)) * TOTAL
            )
        kept.append(now)
    return kept


@pytest.mark.parametrize("scope", ["layer", "global", "lamp"])
@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize(("begin", "end", "every"), [(2, 12, 4), (0, 7, 1), (3, 14, 100)])
def test_sparsity_follows_the_curve_to_the_exact_ratio(scope, regrow, begin, end, every):
    schedule = GradualPruning(0.9, begin, end, every, scope=scope, regrow=regrow)
    recorder = Recorder()
    module, trainer = fit([schedule, recorder], 3)
    assert recorder.kept == counts(schedule, 15)
    assert prune.sparsity(module).kept == round(0.1 * TOTAL)
    assert trainer.callback_metrics["sparsity"] == pytest.approx(1 - round(0.1 * TOTAL) / TOTAL)
    if not regrow:
        for early, late in zip(recorder.masks, recorder.masks[1:], strict=False):
            assert not bool((late & ~early).any())


def test_it_begins_where_it_is_told():
    recorder = Recorder()
    fit([GradualPruning(0.9, 0, 10, 5, initial_sparsity=0.5), recorder], 2)
    assert recorder.kept[0] == TOTAL // 2


def test_masks_stay_between_two_prunings_and_at_the_end():
    recorder = Recorder()
    fit([GradualPruning(0.9, 2, 12, 4), recorder], 4)
    for step in (3, 4, 5, 7, 8, 9, 13, 14, 15, 19):
        assert torch.equal(recorder.masks[step], recorder.masks[step - 1])


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_resumed_run_is_bit_equal(epochs, tmp_path):
    def pruning():
        return GradualPruning(0.9, 2, 12, 3)

    whole, _ = fit([pruning()], 4)
    fit([pruning()], epochs, save=tmp_path / "a.ckpt")
    resumed, _ = fit([pruning()], 4, module=Module(seed=1), ckpt_path=tmp_path / "a.ckpt")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_one_callback_serves_two_runs():
    schedule = GradualPruning(0.9, 2, 8, 2)
    for _ in range(2):
        recorder = Recorder()
        module, _ = fit([schedule, recorder], 2)
        assert recorder.kept == counts(schedule, 10)
    prune.remove(module)
    assert prune.sparsity(module).kept == round(0.1 * TOTAL)


def test_skip_and_the_users_own_masks():
    module = Module()
    prune.magnitude(module.network[3], 0.5)
    fit([GradualPruning(0.9, 0, 4, 2, skip=["network.3"])], 1, module=module)
    layers = prune.sparsity(module).layers
    assert (layers["network.0"].kept, layers["network.3"].kept) == (7, 128)


def test_a_run_that_ends_early_says_so(capfd):
    fit([GradualPruning(0.9, 2, 50, 4)], 1)
    assert "gradual pruning did not reach sparsity 0.9: training ended at step 5, the schedule ends at 50" in (
        capfd.readouterr().err
    )
    fit([GradualPruning(0.9, 2, 5, 4)], 1)
    assert "did not reach" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0, 5, 1), r"final_sparsity must lie in \[0, 1\), got 1.0"),
        ((0.5, 5, 5, 1), "begin must be >= 0 and below end = 5, got 5"),
        ((0.5, 0, 5, 0), "every must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(*arguments)
    with pytest.raises(ValueError, match=r"initial_sparsity must be <= final_sparsity = 0\.5, got 0\.6"):
        GradualPruning(0.5, 0, 5, 1, initial_sparsity=0.6)


def sparse():
    module = Module()
    prune.remove(prune.magnitude(module, 0.75))
    return module


def test_keep_sparse_keeps_baked_zeros():
    filled, _ = fit([], 2, module=sparse())
    assert prune.sparsity(filled).sparsity < 0.1
    module, trainer = fit([KeepSparse()], 2, module=sparse())
    assert prune.sparsity(module).kept == TOTAL // 4
    assert trainer.callback_metrics["sparsity"] == 0.75


def test_keep_sparse_resumes_in_a_network_that_is_dense_at_first(tmp_path):
    whole, _ = fit([KeepSparse()], 3, module=sparse())
    fit([KeepSparse()], 1, module=sparse(), save=tmp_path / "a.ckpt")
    resumed, _ = fit([KeepSparse()], 3, module=Module(seed=1), ckpt_path=tmp_path / "a.ckpt")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_keep_sparse_notices_what_fills_zeros():
    class Spoiler(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *rest):
            pl_module.network[0].parametrizations.weight[0].keep.fill_(1)

    with pytest.raises(RuntimeError, match="training must keep at most 82 weights, got 136 after epoch 0"):
        fit([Spoiler(), KeepSparse()], 1, module=sparse())
    module, _ = fit([KeepSparse(skip=["network.0"])], 1, module=sparse())
    assert prune.sparsity(module).layers["network.3"].kept == 64

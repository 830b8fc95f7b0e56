import lightning
import pytest
import torch
from searches import equal

from netwright.data.tensors import Batches, TensorImages
from netwright.search import spaces
from netwright.search.darts import DARTS
from netwright.search.dass import DASS, DASSStages
from netwright.search.lightning import SearchModule
from netwright.search.rarts import RARTS
from netwright.search.self_distill import SDDARTS
from netwright.seeding import stream


def loaders():
    generator = stream(0, "images")
    x, y = torch.rand(24, 1, 8, 8, generator=generator), torch.randint(3, (24,), generator=generator)
    return Batches(TensorImages(x, y), 8, steps=2), Batches(TensorImages(x.flip(0), y.flip(0)), 8, name="validation")


def make(kind):
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
    if kind == "dass":
        return DASS(supernet, 0.1, DASSStages(1, 1, 1))
    if kind == "rarts":
        return RARTS(supernet, epochs=3)
    if kind == "sd-darts":
        return SDDARTS(supernet, epochs=3)
    return DARTS(supernet, order=2, epochs=3)


def trainer(folder=None, **options):
    return lightning.Trainer(
        max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=folder is not None, default_root_dir=folder, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["darts", "dass", "rarts", "sd-darts"])
def test_lightning_gives_the_bits_of_search(kind):
    plain = make(kind)
    expected = plain.search(*loaders(), seed=0)
    ends = []
    module = SearchModule(make(kind), *loaders(), seed=0, on_epoch=ends.append)
    fitted = trainer()
    fitted.fit(module)
    assert [end.epoch for end in ends] == [1, 2, 3]
    assert equal(plain.state_dict(), module.searcher.state_dict())
    result = module.result()
    assert result.genotype == expected.genotype
    assert equal(result.alpha_history, expected.alpha_history)
    assert float(fitted.callback_metrics["skip_share"]) == pytest.approx(expected.skip_share[-1])
    assert float(fitted.callback_metrics["train_loss"]) == pytest.approx(expected.epochs[-1]["train_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["darts", "dass", "rarts", "sd-darts"])
def test_a_checkpoint_of_any_epoch_goes_on_to_the_same_bits(kind, tmp_path):
    plain = make(kind)
    plain.search(*loaders(), seed=0)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, callbacks=[saving]).fit(SearchModule(make(kind), *loaders(), seed=0))
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 3
    for path in checkpoints:
        state = torch.load(path, weights_only=True)
        torch.manual_seed(1)
        module = SearchModule(make(kind), *loaders(), seed=0)
        trainer().fit(module, ckpt_path=path, weights_only=True)
        assert module.searcher.finished
        assert equal(plain.state_dict(), module.searcher.state_dict()), state["epoch"]


def test_a_checkpoint_inside_an_epoch_is_refused(tmp_path):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="state_dict must be called between two epochs"):
        trainer(tmp_path, callbacks=[saving]).fit(SearchModule(make("darts"), *loaders(), seed=0))


def test_another_seed_than_the_checkpoints_is_refused(tmp_path):
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path)
    trainer(tmp_path, callbacks=[saving]).fit(SearchModule(make("darts"), *loaders(), seed=0))
    with pytest.raises(ValueError, match="seed must be 0"):
        trainer().fit(
            SearchModule(make("darts"), *loaders(), seed=1), ckpt_path=saving.best_model_path, weights_only=True
        )


def test_epochs_may_be_changed_on_the_way():
    module = SearchModule(
        make("darts"), *loaders(), seed=0, on_epoch=lambda end: end.searcher.set_epochs(2) if end.epoch == 1 else None
    )
    trainer().fit(module)
    assert module.searcher.epoch == 2
    assert module.searcher.progress == pytest.approx(1.0)

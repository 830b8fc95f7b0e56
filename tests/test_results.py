import json
import math
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from netwright.results import History, Result, new_axes, plain, save_figure


@dataclass(frozen=True)
class Inner(Result):
    accuracy: float
    curve: tuple[float, ...] = (0.5, math.nan)


@dataclass(frozen=True)
class Outer(Result):
    name: str
    inner: Inner
    weights: torch.Tensor
    where: Path
    by_class: dict
    passed: bool = True


def example():
    return Outer("run", Inner(0.91234567), torch.tensor([[1, 2]]), Path("a/b"), {0: np.float32(0.5), "x": {3}})


def test_to_dict_is_json_all_the_way_down():
    data = example().to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data == {
        "name": "run",
        "inner": {"accuracy": 0.91234567, "curve": [0.5, None]},
        "weights": [[1, 2]],
        "where": "a/b",
        "by_class": {"0": 0.5, "x": [3]},
        "passed": True,
    }


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, np.float64("nan"), torch.tensor(math.inf)])
def test_what_json_lacks_becomes_none(value):
    assert plain(value) is None


def test_text_is_a_short_table_of_the_scalars():
    assert str(example()).splitlines() == [
        "Outer",
        "figure  value",
        "name    run",
        "where   a/b",
        "passed  True",
    ]
    assert "0.9123" in str(Inner(0.91234567))


def test_results_are_frozen():
    with pytest.raises(FrozenInstanceError):
        Inner(0.5).accuracy = 1.0


def test_a_result_without_a_picture_says_so():
    with pytest.raises(NotImplementedError, match="Inner has no picture"):
        Inner(0.5).plot()


def history():
    return History(({"train_loss": 2.0, "accuracy": 0.3}, {"train_loss": 1.0, "validation_loss": 1.5}), seconds=3.0)


def test_history_columns_and_last():
    run = history()
    assert run.column("train_loss") == [2.0, 1.0]
    assert math.isnan(run.column("validation_loss")[0])
    assert run.last == {"train_loss": 1.0, "validation_loss": 1.5}
    assert History().last == {}
    assert str(run).splitlines()[1].split() == ["1", "0.3", "2", "nan"]
    assert run.to_dict()["epochs"][0] == {"train_loss": 2.0, "accuracy": 0.3}


def test_history_plots_every_loss_on_the_axes_given():
    axes = new_axes()
    assert history().plot(axes) is axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
    assert set(lines) == {"train loss", "validation loss"}
    assert lines["train loss"] == [2.0, 1.0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")


def test_new_axes_leave_pyplot_alone():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    axes = new_axes(size=(2, 1))
    assert plt.get_fignums() == before
    assert tuple(axes.figure.get_size_inches()) == (2, 1)


@pytest.mark.parametrize(("suffix", "start"), [(".svg", b"<?xml"), (".png", b"\x89PNG")])
def test_a_figure_is_written_as_its_suffix_says_and_the_same_twice(tmp_path, suffix, start):
    for folder in ("a", "b"):
        ax = new_axes()
        ax.plot([1, 2, 3])
        save_figure(ax.get_figure(root=True), tmp_path / folder / f"curve{suffix}")
    first, second = ((tmp_path / folder / f"curve{suffix}").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert first.startswith(start)


def test_a_figure_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path must end with one of \.svg, \.png, got 'curve\.pdf'"):
        save_figure(new_axes().get_figure(root=True), tmp_path / "curve.pdf")
    assert not list(tmp_path.iterdir())

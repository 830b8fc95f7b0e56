"""``netwright explain --tabular``: what is printed, the page, and bad input, which leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from netwright import cli
from netwright.seeding import numpy_stream


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of five columns decide."""
    random = numpy_stream(0, "csv")
    X = random.normal(size=(240, 3))
    word = random.choice(["red", "blue"], 240)
    y = ["yes" if a > 0.2 and w == "red" else "no" for a, w in zip(X[:, 1], word, strict=True)]
    lines = [
        f"{a:.5f},{b:.5f},{c:.5f},{w},id{i},{k}" for i, ((a, b, c), w, k) in enumerate(zip(X, word, y, strict=True))
    ]
    file = tmp_path_factory.mktemp("table") / "a.csv"
    file.write_text("\n".join(["one,two,three,colour,name,bought", *lines]) + "\n")
    return file


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["explain", *map(str, arguments)])


@pytest.fixture(scope="module")
def explained(csv, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "page"
    done = run("--tabular", csv, "--target", "bought", "--out", out, "--features", 2, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), out


def test_the_columns_that_decide_are_found(explained):
    told, _ = explained
    assert set(told["features"]) == {"two", "colour=red"}
    assert told["left_out"] == ["name"]
    assert told["classes"] == ["no", "yes"]
    assert told["accuracy"] > 0.8
    assert told["agreement"] > 0.85
    assert any("two" in rule and "THEN yes" in rule for rule in told["rules"])


def test_the_page_holds_rules_and_figures(explained):
    told, out = explained
    assert sorted(p.name for p in out.iterdir()) == ["explained.html", "explained.json", "explained.md"]
    page = (out / "explained.html").read_text()
    assert page.count("<svg") >= 2
    assert "THEN yes" in page
    assert "colour=red" in page
    assert json.loads((out / "explained.json").read_text())["figures"]["agreement"] == told["agreement"]


def test_the_same_command_gives_the_same_text(csv, tmp_path):
    given = ["--tabular", csv, "--target", "bought", "--surrogate", "forest", "--epochs", 2, "--features", 3]
    texts = [run(*given, "--out", tmp_path / name).stdout.replace(name, "") for name in ("first", "second")]
    assert texts[0] == texts[1]
    assert "permuting it changes" in texts[0]
    assert "IF " in texts[0]


@pytest.mark.parametrize("encoder", ["dense", "conv"])
def test_an_autoencoder_in_front(csv, tmp_path, encoder):
    done = run(
        "--tabular", csv, "--target", "bought", "--encoder", encoder, "--features", 2, "--epochs", 12,
        "--out", tmp_path / "out",
    )  # fmt: skip
    if done.exit_code == 0:
        assert (tmp_path / "out" / "explained.html").is_file()
    else:
        assert "no surrogate can be trained" in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--target", "bought", "--surrogate", "svm"], "unknown surrogate 'svm'"),
        (["--target", "bought", "--encoder", "deep"], "unknown encoder 'deep'"),
        (["--target", "bought", "--features", "0"], "k must be >= 1"),
        (["--target", "bought", "--features", "99"], "k must be <= 4"),
        (["--target", "bought", "--epochs", "0"], "epochs must be >= 1"),
        (["--target", "sold"], "there is no column 'sold'"),
        ([], "--target is missing"),
        (["--target", "bought", "--center"], "--center means nothing for --tabular"),
        (["--target", "bought", "--method", "grad-cam"], "--method means nothing"),
        (["--target", "bought", "resnet18"], "MODEL means nothing"),
    ],
)
def test_bad_input_is_told_and_leaves_nothing(csv, tmp_path, options, told):
    done = run("--tabular", csv, *options, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_of_tables_mean_nothing_for_images(tmp_path):
    done = run("resnet18", "a.jpg", "--target", "y")
    assert done.exit_code == 2
    assert "--target means nothing for images" in done.stderr
    assert "RUN or MODEL is missing" in run().stderr


def test_a_taken_folder_is_refused(csv, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = run("--tabular", csv, "--target", "bought", "--out", tmp_path)
    assert done.exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]

"""The report of a synthetic run, whole and in every state on the way."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from netwright import storage
from netwright.console import UserError
from netwright.design import charts
from netwright.design.charts import NETWORKS
from netwright.design.measure import wilson
from netwright.design.report import build, readme_text, settings_blocks
from netwright.design.verdict import doubts, goals, speed, verdict
from netwright.page import text_of

SLOWER = "Pruning made this network *not faster* in ONNX Runtime"
CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
NASTY = "<script>alert(1)</script>"


def network(name, accuracy, sparsity, times, parameters, seed, n=1000, classes=10):
    generator = np.random.default_rng(seed)
    confusion = np.zeros((classes, classes), int)
    per_class = n // classes
    for i in range(classes):
        wrong = min(per_class, round((1 - accuracy) * per_class))
        likely = np.exp(-np.abs(np.arange(classes) - i) / 1.5)
        likely[i] = 0
        confusion[i] = generator.multinomial(wrong, likely / likely.sum())
        confusion[i, i] = per_class - wrong
    accuracy = float(np.trace(confusion) / confusion.sum())
    latency = [
        {
            "runtime": "ONNX Runtime 1.23.0",
            "batch": batch,
            "threads": 1,
            "rounds": 60,
            "median_ms": ms,
            "p10_ms": 0.96 * ms,
            "p90_ms": 1.09 * ms,
        }
        for batch, ms in zip((1, 32), times, strict=True)
    ]
    kept = round(parameters * (1 - sparsity))
    return {
        "name": name,
        "accuracy": accuracy,
        "interval": list(wilson(accuracy, n)),
        "nll": 0.31,
        "ece": 2.4,
        "parameters": parameters,
        "nonzeros": kept,
        "sparsity": sparsity,
        "macs": 31_400_000,
        "sparse_macs": round(31_400_000 * (1 - sparsity)),
        "file_bytes": 4 * parameters + 12_000,
        "gzip_bytes": 5 * kept + 4_000,
        "latency": latency,
        "confusion": confusion.tolist(),
        "train_seconds": 311.2,
        "agreement": 3.1e-6,
    }


def epochs(n, start, stop, sparsity=0.0, begin=0.0):
    def at(i):
        return stop - (stop - start) * math.exp(-4 * (i + 1) / n)

    return [
        {
            "train_loss": 2.3 * (1.02 - at(i)),
            "val_accuracy": at(i) + 0.004 * math.sin(7.0 * i),
            "lr": 0.1 * (1 - i / n),
            "sparsity": begin + (sparsity - begin) * (1 - (1 - (i + 1) / n) ** 3),
        }
        for i in range(n)
    ]


def phases(top):
    return {
        "pretrain": epochs(16, 0.4, top),
        "prune": epochs(8, top, top - 0.05, 0.95),
        "finetune": epochs(8, top - 0.05, top - 0.012, 0.95, 0.95),
    }


def artefacts(classes=CLASSES):
    shape = [1, 28, 28]
    cell = {
        "ops": [
            *[["sep_conv_3x3", 0], ["skip_connect", 1], ["dil_conv_3x3", 0], ["sep_conv_5x5", 2]],
            *[["max_pool_3x3", 1], ["sep_conv_3x3", 2], ["skip_connect", 0], ["sep_conv_3x3", 3]],
        ],
        "concat": [2, 3, 4, 5],
    }
    reduce = {**cell, "ops": [["max_pool_3x3" if op == "skip_connect" else op, p] for op, p in cell["ops"]]}
    options = {
        "data": "fashion-mnist",
        "sparsity": 0.95,
        "time_budget": 900.0,
        "accuracy_goal": None,
        "search": "dass",
        "space": "micro-darts",
        "baseline": "mobilenet_v2",
        "seed": 0,
        "download": False,
    }
    stages = [
        {
            "name": "search",
            "seconds": 160.0,
            "sizes": {"channels": 8, "epochs": "5+5+2"},
            "why": "DASS over micro-darts",
        },
        {"name": "model: pretrain", "seconds": 190.0, "sizes": {"channels": 16, "epochs": 16}, "why": "its share"},
        {"name": "finish", "seconds": 30.0, "sizes": {}, "why": "export, measure, report"},
    ]
    return {
        "run": {
            "kind": "netwright-run",
            "command": "netwright design fashion-mnist --sparsity 0.95 --time-budget 15m --out runs/fashion",
            "options": options,
            "versions": {"python": "3.11.7", "netwright": "0.1.0", "torch": "2.14.1", "onnxruntime": "1.23.0"},
            "machine": {"cpu": "Some CPU @ 2.6 GHz", "cores": 2, "threads": 2, "gpu": None},
            "started": "2026-11-22T22:12:00+00:00",
        },
        "data": {
            "name": "fashion-mnist",
            "shape": shape,
            "classes": list(classes),
            "counts": {
                part: {name: n + (0 if i else -n // 3) for i, name in enumerate(classes)}
                for part, n in (("train", 540), ("validation", 60), ("test", 100))
            },
            "problems": [
                {
                    "kind": "duplicates",
                    "message": "3 images stand in train and test",
                    "where": "train/0012.png",
                    "spoils": False,
                }
            ],
        },
        "plan": {
            "stages": stages,
            "amendments": [{"what": "model: prune has 7 epochs", "why": "time, seen after epoch 3"}],
        },
        "search": {
            "genotype": {"space": "darts", "version": 1, "normal": cell, "reduce": reduce},
            "alpha_history": [],
            "skip_share": [0.1, 0.12, 0.19, 0.25, 0.25, 0.25],
            "wall_time": 158.2,
            "seed": 0,
        },
        "training": {"model": phases(0.912), "baseline": phases(0.905)},
        "classes": list(classes),
        "architecture": {"kind": "genotype", "shape": shape, "classes": list(classes), "picture": True},
        "measurements": {
            "model": network("DASS cell network", 0.91, 0.95, (0.412, 7.1), 182_000, 0),
            "dense": network("DASS cell network", 0.92, 0.0, (0.405, 7.0), 182_000, 1),
            "baseline": network("MobileNet-v2", 0.9, 0.95, (0.98, 19.8), 2_230_000, 2),
            "baseline_dense": network("MobileNet-v2", 0.905, 0.0, (0.99, 20.1), 2_230_000, 3),
            "goal": {"sparsity": 0.95, "time_budget": 900.0, "seconds_used": 861.0},
        },
    }


def write_run(folder, parts):
    for name, value in parts.items():
        storage.write_json(folder / f"{name}.json", value)
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    blobs = [np.exp(-((x - a) ** 2 + (y - b) ** 2) / (3 * c)) for a, b, c in generator.uniform(6, 22, (24, 3))]
    np.savez(
        folder / "mistakes.npz",
        images=(255 * np.stack(blobs)[..., None]).astype(np.uint8),
        true=np.arange(24) % 10,
        predicted=(np.arange(24) % 10 + 1 + np.arange(24) % 8) % 10,
        confidence=generator.uniform(0.5, 1, 24),
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), artefacts())


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    build(run).write(folder)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are made but not drawn, for tests of everything around them."""
    monkeypatch.setattr("netwright.design.charts.svg", lambda *_, **__: "<svg></svg>")


def without(parts, *names):
    return {name: value for name, value in parts.items() if name not in names}


def at(ms, accuracy=0.9, **more):
    latency = [{"runtime": "ONNX Runtime", "batch": 1, "threads": 1, "median_ms": ms}]
    return {"accuracy": accuracy, "latency": latency, **more}


def test_the_first_screen_comes_in_the_promised_order(written):
    text = (written / "report.html").read_text().replace("\xa0", " ")
    marks = [
        "The designed network is right on 91.0 % of 1,000 test examples",
        "Pruning made this network",
        "<svg",
        "How to use it",
        "onnxruntime.InferenceSession",
        "What to doubt",
        "<details>",
    ]
    assert (places := [text.index(mark) for mark in marks]) == sorted(places)
    first = text[: text.index("<details>")]
    assert first.count("<svg") == 1
    assert "baseline, pruned" in first


def test_the_report_is_small_safe_and_the_same_twice(run, written, tmp_path):
    code = f"""
import sys
from netwright.design.report import build
build({str(run)!r}).write({str(tmp_path)!r})
print([name for name in ("lightning", "matplotlib.pyplot") if name in sys.modules])
"""
    environment = {"PYTHONHASHSEED": "3", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"
    assert done.stderr == ""
    text = (written / "report.html").read_text().replace("\xa0", " ")
    assert len(text.encode()) < 400_000
    assert not re.search(r"""src=["']?[^"'>]*http""", text)
    assert "http:" not in text
    assert "https:" not in text
    assert "<script" not in text
    for name in ("report.html", "report.md", "report.json"):
        assert (written / name).read_bytes() == (tmp_path / name).read_bytes()


def test_every_measured_figure_is_in_all_three_files(written):
    text = (written / "report.html").read_text().replace("\xa0", " ")
    markdown = (written / "report.md").read_text()
    figures = json.loads((written / "report.json").read_text())["figures"]
    measured = artefacts()["measurements"]
    assert {name: figures["measurements"][name] for name in NETWORKS} == {n: measured[n] for n in NETWORKS}
    assert figures["training"] == artefacts()["training"]
    for name in NETWORKS:
        network = measured[name]
        shown = [f"{100 * network['accuracy']:.2f} %", f"{network['nonzeros']:,}", f"{100 * network['sparsity']:.2f} %"]
        shown += [f"{100 * network['interval'][0]:.2f}\u2013{100 * network['interval'][1]:.2f} %"]
        for figure in shown:
            assert f">{figure}<" in text
            assert f"| {figure} |" in markdown
    for batch, median in ((1, "0.412 ms"), (1, "0.405 ms"), (32, "7.10 ms"), (32, "20.1 ms")):
        row = next(line for line in markdown.splitlines() if line.startswith(f"| batch {batch}, median"))
        assert f"| {median} |" in row
    assert "1 thread, preprocessing included" in text


def test_not_faster_is_said_in_exactly_these_words(written):
    text = (written / "report.html").read_text().replace("\xa0", " ")
    first = text[: text.index("<details>")]
    assert "Pruning made this network <em>not faster</em> in ONNX Runtime: 0.412 ms against 0.405 ms" in first
    assert SLOWER in (written / "report.md").read_text()
    told = json.loads((written / "report.json").read_text())["sections"][0]["blocks"][0]["text"]
    assert told.startswith(SLOWER)
    assert "1 thread" in told
    assert "the baseline takes 0.980 ms, so this network is 2.4 times as fast" in told


@pytest.mark.parametrize(
    ("pruned", "dense", "slower"),
    [(1.0, 0.9, True), (1.0, 1.0, True), (1.0, 1.04, True), (1.0, 1.06, False), (1, 3, False)],
)
def test_faster_only_beyond_what_timing_can_tell(pruned, dense, slower):
    told = text_of(speed({"model": at(pruned), "dense": at(dense)}))
    assert told.startswith(SLOWER) is slower
    assert ("times as fast" in told) is not slower


def test_speed_against_the_baseline_goes_both_ways():
    assert "so this network is 50 % slower" in text_of(speed({"model": at(3.0), "dense": at(3.0), "baseline": at(2.0)}))
    assert "so this network is 33 % quicker" in text_of(speed({"model": at(2.0), "baseline": at(3.0)}))
    assert "no quicker and no slower" in text_of(speed({"model": at(2.0), "baseline": at(2.04)}))
    ours = at(1.0)
    ours["latency"].append({"runtime": "netwright", "batch": 1, "threads": 1, "median_ms": 0.25})
    told = text_of(speed({"model": ours, "dense": at(1.0)}))
    assert told.startswith(SLOWER)
    assert "in netwright it takes 0.250 ms, 4.0 times as fast" in told
    assert "not been measured" in text_of(speed({"model": {"accuracy": 0.9}}))


def test_the_verdict_follows_the_figures():
    model = {"accuracy": 0.91, "interval": [0.9, 0.92], "sparsity": 0.9497}
    better = {"accuracy": 0.935, "interval": [0.925, 0.945], "sparsity": 0.95, "name": "B"}
    goal = {"sparsity": 0.95, "accuracy": 0.92, "time_budget": 100.0, "seconds_used": 112.0}
    told = text_of(verdict({"model": model, "baseline": better, "goal": goal}, 1234))
    assert "91.0 % of 1,234 test examples (95 % interval 90.0 to 92.0 %)" in told
    assert "*the baseline is better*: B reaches 93.5 % (92.5 to 94.5 %) at 95.0 % sparsity, 2.5 points more" in told
    assert "overlap" not in told
    assert "the goal of 95.0 % sparsity is met" in told
    assert "*the goal of 92.0 % accuracy is missed by 1.0 point*" in told
    assert "the run was 12 s (12 %) over the 1 min 40 s allowed" in told
    worse = {**better, "accuracy": 0.903, "interval": [0.89, 0.915]}
    told = text_of(verdict({"model": model, "baseline": worse}))
    assert "0.7 points more than the baseline, B" in told
    assert "but the intervals overlap" in told
    assert "is as accurate" in text_of(verdict({"model": model, "baseline": {**better, "accuracy": 0.9104}}))
    assert "no baseline has been measured yet" in text_of(verdict({"model": model}))


def test_goals_are_met_up_to_rounding_and_the_promised_tolerance():
    def met(**goal):
        model = {"sparsity": 0.9496, "accuracy": 0.9}
        return {name: found["met"] for name, found in goals({"model": model, "goal": goal}).items()}

    assert met(sparsity=0.95) == {"sparsity": True}
    assert met(sparsity=0.96) == {"sparsity": False}
    assert met(accuracy=0.9001) == {"accuracy": False}
    assert met(time_budget=100.0, seconds_used=114.9) == {"time": True}
    assert met(time_budget=100.0, seconds_used=115.1) == {"time": False}
    assert met(time_budget=None, seconds_used=1e9) == {}


def test_doubts_name_the_weak_spots():
    confusion = [[8, 2, 0], [1, 9, 0], [0, 1, 2]]
    model = {"accuracy": 0.8, "interval": [0.7, 0.9], "confusion": confusion, "ece": 7.0, "agreement": 1e-3}
    data = {"counts": {"train": {"a": 50, "b": 50, "c": 7}}, "problems": [{"spoils": True}, {"spoils": False}]}
    measured = {"model": model, "baseline": {"accuracy": 0.85, "interval": [0.8, 0.9]}, "dense": {"accuracy": 0.9}}
    told = "\n".join(map(text_of, doubts(measured, data, ["a", "b", "c"], 3)))
    assert "\u201cc\u201d, has 7 training examples; the network is right on 2 of its 3 test examples" in told
    assert "\u201ca\u201d is taken for \u201cb\u201d in 2 of 10 cases" in told
    assert "One seed was run (seed 3)" in told
    assert "overlap" in told
    assert "Pruning cost 10.0 points" in told
    assert "7.0 %" in told
    assert "2 faults, 1 of them serious" in told
    quiet = {**measured, "dense": None, "model": {**model, "interval": [0.7, 0.75], "ece": 1.0, "agreement": 1e-6}}
    told = "\n".join(map(text_of, doubts(quiet, {"counts": data["counts"], "problems": []}, ["a", "b", "c"], 3)))
    for absent in ("overlap", "Pruning cost", "calibration", "fault", "logit"):
        assert absent not in told


@pytest.mark.parametrize(
    ("kept", "stage"),
    [
        (("run",), "checking the data"),
        (("run", "data"), "the plan"),
        (("run", "data", "plan"), "the search for an architecture"),
        (("run", "data", "plan", "search"), "dense training of the network"),
        (("run", "data", "plan", "search", "training"), "measuring"),
    ],
)
def test_an_unfinished_run_says_what_comes_next(kept, stage, undrawn, tmp_path):
    parts = {name: artefacts()[name] for name in kept}
    for name, value in parts.items():
        storage.write_json(tmp_path / f"{name}.json", value)
    page = build(tmp_path)
    told = text_of(page.verdict)
    assert told.startswith("*This run is not finished*")
    assert f"the next stage is {stage}." in told
    page.write(tmp_path)
    assert "What to doubt" not in page.html()


def test_a_network_that_only_guesses_is_called_so():
    guessing = {"accuracy": 0.5, "interval": [0.4, 0.6], "confusion": [[5, 0, 0], [3, 0, 0], [2, 0, 0]]}
    learned = {**guessing, "interval": [0.51, 0.6]}
    told = "\n".join(map(text_of, doubts({"model": learned, "baseline": guessing}, None, "abc", 0)))
    assert "The baseline is no better than always naming the largest class, which gives 50.0 %." in told
    assert "This network is no better" not in told


def test_the_stages_that_are_done_count_before_training_json_is_written(undrawn, tmp_path):
    parts = artefacts()
    for name in ("run", "data", "plan", "search"):
        storage.write_json(tmp_path / f"{name}.json", parts[name])
    for stage, epochs_done in parts["training"]["model"].items():
        storage.write_json(tmp_path / f"work/model-{stage}.json", {"epochs": epochs_done, "seconds": 1.0})
    (tmp_path / "model.onnx").touch()
    page = build(tmp_path)
    assert "the next stage is dense training of the baseline." in text_of(page.verdict)
    assert "Training curves" in page.markdown()
    assert "InferenceSession" in page.markdown()


def test_networks_measured_under_their_key_get_a_name(undrawn, tmp_path):
    parts = artefacts()
    for key in NETWORKS:
        parts["measurements"][key]["name"] = key
    page = build(write_run(tmp_path, parts))
    assert "1.0 point more than the baseline, mobilenet_v2, with 90.0 %" in text_of(page.verdict)
    assert "Networks: micro-darts cells found by dass, mobilenet_v2." in page.markdown()


def test_without_pruning_nothing_is_said_about_it():
    run = {"model": at(1.0, sparsity=0.0), "dense": at(1.0), "goal": {"sparsity": 0.0}}
    assert text_of(speed(run)) == "This network takes 1.00 ms in ONNX Runtime (median at batch 1, 1 thread)."
    assert "removed" not in text_of(verdict(run))
    assert "goal" not in text_of(verdict(run))


def test_training_half_done_names_the_next_stage_and_the_best_so_far(undrawn, tmp_path):
    parts = artefacts()
    parts["training"] = {"model": {"pretrain": parts["training"]["model"]["pretrain"]}, "baseline": {}}
    for name in ("run", "data", "plan", "search", "training"):
        storage.write_json(tmp_path / f"{name}.json", parts[name])
    told = text_of(build(tmp_path).verdict)
    score = parts["training"]["model"]["pretrain"][-1]["val_accuracy"]
    assert "the next stage is pruning of the network." in told
    assert f"right on {100 * score:.1f} % of the validation examples" in told


@pytest.mark.parametrize("missing", [*artefacts(), "mistakes"])
def test_any_part_may_be_missing(missing, undrawn, tmp_path):
    write_run(tmp_path, without(artefacts(), missing))
    if missing == "mistakes":
        (tmp_path / "mistakes.npz").unlink()
    build(tmp_path).write(tmp_path)


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "model"])
def test_any_network_may_be_missing(network, tmp_path):
    parts = artefacts()
    parts["measurements"] = without(parts["measurements"], network)
    text = build(write_run(tmp_path, parts)).html().replace("\xa0", " ")
    assert "The designed network is right on" in text


def test_a_class_called_script_stays_a_name(tmp_path):
    parts = artefacts([NASTY, *CLASSES[1:]])
    parts["data"]["problems"][0]["message"] = NASTY
    page = build(write_run(tmp_path, parts))
    page.write(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 3
    assert "<script" not in (tmp_path / "report.md").read_text().replace("\\<script", "")
    assert json.loads((tmp_path / "report.json").read_text())["figures"]["classes"][0] == NASTY


def test_maps_stand_beside_their_images_and_old_runs_have_none(undrawn, tmp_path):
    write_run(tmp_path, artefacts())
    before = build(tmp_path).html()
    assert "Eigen-CAM" not in before
    np.savez(
        tmp_path / "maps.npz",
        images=np.full((2, 8, 8, 1), 128, np.uint8), true=[0, 1], predicted=[0, 2], confidence=[0.97, 0.8],
        maps=np.linspace(0, 1, 128).reshape(2, 8, 8).astype(np.float16),
    )  # fmt: skip
    after = build(tmp_path).html().replace("\xa0", " ")
    assert "Eigen-CAM" in after
    assert "t-shirt (97 %)" in after
    assert "trouser, taken for pullover (80 %)" in after
    assert after.count("data:image/png") == before.count("data:image/png") + 2
    (tmp_path / "maps.npz").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(UserError, match=r"damaged file: .*\n.*maps.npz"):
        build(tmp_path)


def test_a_hundred_classes_stay_small_and_legible(tmp_path):
    names = [f"class number {i}" for i in range(100)]
    parts = artefacts(names)
    parts["measurements"]["model"] = network("N", 0.7, 0.95, (1.0, 9.0), 10**5, 0, n=5000, classes=100)
    text = build(write_run(tmp_path, parts)).html().replace("\xa0", " ")
    assert len(text.encode()) < 1_000_000


def test_data_that_are_no_pictures_are_listed_instead(undrawn, tmp_path):
    parts = artefacts()
    parts["architecture"]["picture"] = False
    write_run(tmp_path, parts)
    np.savez(
        tmp_path / "mistakes.npz",
        images=np.zeros((2, 1, 1, 40), np.float32),
        true=[0, 1],
        predicted=[1, 2],
        confidence=[0.9, 0.8],
    )
    text = build(tmp_path).html().replace("\xa0", " ")
    assert "data:image/png" not in text
    assert "t-shirt, taken for trouser (90 %)" in text
    assert "float32, [batch, channels, height, width]" in text


def test_damage_is_told_in_one_line_with_the_file(undrawn, tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        build(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no run"):
        build(tmp_path)
    write_run(tmp_path, artefacts())
    (tmp_path / "mistakes.npz").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(UserError, match=r"damaged file: .*\n.*mistakes.npz"):
        build(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        build(tmp_path)


def test_an_unknown_genotype_does_not_stop_the_report(undrawn, tmp_path):
    parts = artefacts()
    parts["search"]["genotype"] = {"space": "from tomorrow", "version": 9}
    text = build(write_run(tmp_path, parts)).html().replace("\xa0", " ")
    assert "The cells cannot be drawn" in text
    assert "from tomorrow" in text


def architecture(picture=True):
    from netwright.design.model import Architecture

    return Architecture("named", (3, 8, 8), ("cat", "dog", "emu"), (0.5,) * 3, (0.2,) * 3, picture, name="resnet18")


def snippets(text):
    blocks = re.findall(r"(?:^    .*\n){2,}", text, re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks]


@pytest.mark.parametrize("picture", [True, False])
def test_the_readme_holds_five_lines_twice_and_every_file(picture):
    text = readme_text(architecture(picture))
    found = snippets(text)
    assert [len(lines.splitlines()) for lines in found] == [5, 5]
    for lines in found:
        compile(lines, "README.txt", "exec")
    for name in ("model.onnx", "architecture.json", "model.safetensors", "classes.json", "sample.npz", "report.html"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 140


def test_the_onnx_lines_run_in_a_moved_folder_without_netwright(tmp_path):
    """A hand-made ONNX file: the class is the channel whose mean is largest."""
    import onnx
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", "height", "width", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float"], ["logits"], axes=[1, 2], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "g", [image], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    storage.write_json(tmp_path / "classes.json", ["cat", "dog", "emu"])
    images = np.zeros((3, 5, 7, 3), np.uint8)
    for i, channel in enumerate((2, 0, 1)):
        images[i, ..., channel] = 200
    np.savez(tmp_path / "sample.npz", images=images, labels=[2, 0, 1])
    lines = snippets(readme_text(architecture()))[0]
    code = f"import sys; sys.modules['netwright'] = sys.modules['torch'] = None\n{lines}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "['emu' 'cat' 'dog']\n", done.stderr


def test_coherence_is_drawn_where_it_was_measured(undrawn, tmp_path):
    parts = artefacts()
    assert "Do examples agree?" not in build(write_run(tmp_path / "before", parts)).markdown()
    learned = parts["training"]["model"]["pretrain"]
    for number, epoch in enumerate(learned):
        epoch["coherence_examples"] = 100
        if number % 2:  # an epoch without a measurement leaves a gap
            epoch["m_coherence"] = 20.0 / (number + 1)
    page = build(write_run(tmp_path / "after", parts))
    assert "Do examples agree?" in page.markdown()
    chart = charts.coherence(parts["training"])
    assert chart.data == [(i + 1, 20.0 / (i + 1)) for i in range(1, len(learned), 2)]


def test_a_finished_run_has_the_coherence_of_its_training(finished):
    epochs = storage.read_json(finished / "training.json")["model"]["pretrain"]
    seen = [epoch["m_coherence"] for epoch in epochs if epoch.get("m_coherence") is not None]
    assert seen
    assert all(0 <= value <= 100 for value in seen)
    assert epochs[-1]["coherence_examples"] == 100
    assert "Do examples agree?" in (finished / "report.md").read_text()


def test_a_setting_that_names_nothing_is_a_dash():
    named = {"train_method": [], "download": False, "seed": 0, "latency_ms": None, "space": "micro-darts"}
    *_, values = settings_blocks({"options": named})
    lines = values.markdown().splitlines()
    assert lines == ["- train_method: –", "- download: no", "- seed: 0", "- latency_ms: –", "- space: micro-darts"]

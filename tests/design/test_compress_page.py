"""The page about a compression."""

import pytest

from netwright.compress.chain import Compression, Measured
from netwright.console import UserError
from netwright.design.compress_page import Compressed, build, chart, page, verdict
from netwright.page import text_of

RUN = {"options": {"seed": 3}, "command": "netwright compress it"}


def measured(step, accuracy, size, torch_ms, runtime_ms=None):
    return Measured(step, accuracy, 1000, 900, 5000, 4000, size, torch_ms, runtime_ms)


def result(last=0.93, torch_ms=0.5, runtime_ms=0.1, **changes):
    steps = (measured("as given", 0.95, 40_000, 0.5, 0.2), measured("prune", last, 10_000, torch_ms, runtime_ms))
    facts = {
        "folder": "out", "model": "mine", "data": "digits", "methods": ("low-rank", "prune"), "trained": True,
        "examples": 360, "files": {"packed.safetensors": 9_500}, "report": Compression(steps, {"0": 3}), "missing": (),
    }  # fmt: skip
    return Compressed(**facts | changes)


def test_the_verdict_is_computed():
    told = text_of(verdict(result()))
    assert told.startswith("After low-rank and prune, mine takes 10.0 kB on disk, 4.0 times less than before")
    assert "right on 93.0 % of 360 test examples (95 % interval 89.9 to 95.2 %; 95.0 % before)" in told
    assert "one input takes 0.100 ms instead of 0.200 ms" in told
    assert text_of(verdict(result(torch_ms=0.5, runtime_ms=0.195))).endswith("; it is *not faster*.")
    assert "instead of" in text_of(verdict(result(torch_ms=0.1, runtime_ms=None)))
    plain = text_of(verdict(result(last=None, examples=None)))
    assert "right on" not in plain


def test_every_step_is_a_row_of_table_and_figure():
    made = build(result(missing=("no model.onnx: why",)), RUN, {"name": "digits"})
    text = made.markdown()
    assert "| as given | 95.00 % | 40.0 kB | 1.0 | 900 | 4,000 | 0.500 ms | 0.200 ms |" in text
    assert "| prune | 93.00 % | 10.0 kB | 4.0 |" in text
    assert "no model.onnx: why" in text
    assert "share values" in text  # 93 and 95 % of 360 cannot be told apart
    assert "| 0 | 3 |" in text
    assert "share values" not in build(result(last=0.5), RUN, None).markdown()
    figure = chart(result())
    assert [row["step"] for row in figure.data] == ["as given", "prune"]
    assert {"test accuracy, %", "on disk, kB", "one input, ms"} <= {
        t for t in figure.image.replace(">", "<").split("<")
    }


def test_without_data_there_are_two_panels_and_a_doubt():
    steps = (measured("as given", None, 4_000_000, 5.0), measured("quantize", None, 500_000, 5.0))
    bare = result(report=Compression(steps, {}), data=None, examples=None, trained=False, methods=("quantize",))
    image = chart(bare).image
    assert "test accuracy" not in image
    assert "on disk, MB" in image
    text = build(bare, RUN, None).markdown()
    assert "Nothing was trained" in text
    assert "sparse runtime |" not in text


def test_a_page_needs_a_finished_compression(tmp_path):
    with pytest.raises(UserError, match="no compression of netwright"):
        page(tmp_path)

import copy
import io
import pickle
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netwright import console
from netwright.console import UserError, clock, configure, nearest, note, overall, table, task, warn


@pytest.fixture(autouse=True)
def loud():
    configure(quiet=False)
    yield
    configure(quiet=False)


def test_error_says_what_where_and_cure():
    error = UserError('class "dog" is in test/ but not in train/', where="my-data/test/dog", cure="add --drop-unknown")
    assert str(error).splitlines() == [
        'class "dog" is in test/ but not in train/',
        "  in my-data/test/dog",
        "  do add --drop-unknown",
    ]
    assert str(UserError("only what")) == "only what"
    assert isinstance(error, ValueError)


class ParticularError(UserError):
    pass


@pytest.mark.parametrize("send", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("kind", [UserError, ParticularError])
def test_error_survives_the_way_between_processes(send, kind):
    error = send(kind("what", where="there", cure="this"))
    assert type(error) is kind
    assert (error.what, error.where, error.cure) == ("what", "there", "this")
    assert str(error) == "what\n  in there\n  do this"


@pytest.mark.parametrize("typed", ["fashon-mnist", "Fashion-MNIST", "fashion_mnist", "fasion-mnist"])
def test_nearest_name(typed):
    assert nearest(typed, ["digits", "mnist1d", "fashion-mnist"]) == "did you mean fashion-mnist?"


def test_nearest_lists_all_when_nothing_is_near():
    assert nearest("qqq", {"b", "a"}) == "choose one of a, b"


def test_task_off_a_terminal_prints_plain_lines_to_standard_error(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with task("training", total=10) as bar:
        for _ in range(10):
            now[0] += 10.0
            bar.advance(message="best 0.91")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "training: 30 %, 1 min 10 s left; best 0.91",
        "training: 60 %, 40 s left; best 0.91",
        "training: 90 %, 10 s left; best 0.91",
    ]
    assert "\x1b" not in err


def test_short_task_off_a_terminal_prints_nothing(capsys):
    with task("quick", total=3) as bar:
        bar.advance(3)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nested_tasks_share_one_display_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with task("outer", total=2) as outer:
        display = console._display.live
        assert display is not None
        with task("inner", total=4) as inner:
            assert console._display.live is display
            inner.advance(2)
            assert [t.description for t in display.tasks] == ["outer", "inner"]
            assert display.tasks[1].completed == 2
        assert [t.description for t in display.tasks] == ["outer"]
        outer.update(1, total=5, message="best 0.9")
        assert (display.tasks[0].completed, display.tasks[0].total) == (1, 5)
        note("a line above the bars")
    assert console._display.live is None
    assert "a line above the bars" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_display_ends_when_the_block_raises(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(RuntimeError), task("x", total=1):
        raise RuntimeError
    assert console._display.live is None


def test_one_total_bar_over_stages_off_a_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with overall("design", {"search": 60.0, "train": 180.0}) as total:
        with total.stage("search"), task("search", total=2) as bar:
            now[0] += 30.0
            bar.advance(message="best 0.91")
            with task("inside", total=2) as inside:  # a task inside a task is a detail, not the stage's progress
                now[0] += 1.0
                inside.advance(2)
        with total.stage("train"), task("train", total=4) as bar:
            now[0] += 59.0
            bar.advance(2)
    assert capsys.readouterr().err.splitlines() == [
        "[1/2] search",
        "design: 12 %, 3 min 30 s left; best 0.91",
        "[2/2] train",
        "design: 62 %, 54 s left; best 0.91",
    ]


def test_a_task_after_the_stages_stands_alone_again(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with overall("design", {"search": 1.0}) as total, total.stage("search"):
        pass
    with task("later", total=2) as bar:
        now[0] += 40.0
        bar.advance()
    assert capsys.readouterr().err.splitlines()[-1] == "later: 50 %, 40 s left"


def test_stages_move_the_total_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with overall("design", {"search": 1.0, "train": 3.0}) as total:
        display = console._display.live
        with total.stage("search"):
            pass
        assert display.tasks[0].completed == 1
        with total.stage("train"), task("train", total=10) as bar:
            bar.advance(5)
            assert display.tasks[0].completed == pytest.approx(2.5)
            assert display.tasks[1].completed == 5
    assert console._display.overall is None


def test_quiet_silences_notes_and_bars_but_not_warnings(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stderr := Terminal())
    configure(quiet=True)
    with task("silent", total=1) as bar:
        assert console._display.live is None
        bar.advance()
    note("silent too")
    assert stderr.getvalue() == ""
    warn("the disk is nearly full")
    assert stderr.getvalue() == "warning: the disk is nearly full\n"
    note("still silent")
    assert "still" not in stderr.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3600, "1 h 0 min"),
        (86_400, "24 h 0 min"),
    ],
)
def test_clock(seconds, text):
    assert clock(seconds) == text


@given(st.lists(st.tuples(st.integers(), st.text("ab c", max_size=8)), max_size=5))
def test_table_has_a_line_a_row_and_aligned_columns(rows):
    lines = table(rows, ["count", "name"]).splitlines()
    assert len(lines) == len(rows) + 1
    width = max([len("count"), *(len(str(n)) for n, _ in rows)])
    for line, (count, _) in zip(lines[1:], rows, strict=True):
        assert line[:width] == str(count).rjust(width)

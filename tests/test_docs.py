"""What the documentation says is so: its Python runs, its commands and options exist, its links hold."""

import re
import shlex
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(p for p in (ROOT / "docs").rglob("*.md") if p.parent.name != "methods")])
BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(path, language):
    found = [m for m in BLOCK.finditer(path.read_text(encoding="utf-8")) if m[2] == language]
    return [re.sub(rf"^{m[1]}", "", m[3], flags=re.MULTILINE) for m in found]


def python_of(path):
    """The page's own Python; included examples are run by test_examples.py, and some blocks need a run."""
    return [b for b in blocks(path, "python") if "--8<--" not in b and "runs/" not in b]


def commands_of(path):
    lines = [line for b in blocks(path, "bash") for line in b.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.strip().startswith("netwright ")]


@pytest.mark.parametrize("path", [p for p in PAGES if python_of(p)], ids=lambda p: p.stem)
def test_python_of_the_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile("\n".join(python_of(path)), str(path), "exec"), {"__name__": path.stem})


@pytest.mark.parametrize("path", [p for p in PAGES if commands_of(p)], ids=lambda p: p.stem)
def test_commands_of_the_page_exist(path):
    cli = pytest.importorskip("netwright.cli")
    import typer

    group = typer.main.get_command(cli.app)
    for words in commands_of(path):
        assert words, path
        if words[0].startswith("-"):
            continue
        assert words[0] in group.commands, f"no verb {words[0]}"
        known = {option for p in group.commands[words[0]].params for option in (*p.opts, *p.secondary_opts)} | {
            "--help"
        }
        used = {word.partition("=")[0] for word in words[1:] if word.startswith("-")}
        assert used <= known, f"netwright {words[0]}: {sorted(used - known)}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_tree_hold(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target and "methods/" not in target and not target.endswith("reproduced.md"):
            assert (path.parent / target).exists(), target


def test_every_verb_is_in_the_reference():
    cli = pytest.importorskip("netwright.cli")
    import typer

    head, *sections = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("\n## ")
    written = {section.partition("\n")[0]: section for section in sections}
    group = typer.main.get_command(cli.app)
    assert set(written) == set(group.commands)
    for verb, command in group.commands.items():
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert f"`{option}" in written[verb] + head, f"netwright {verb} {option} is not described"

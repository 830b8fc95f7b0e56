"""Every example runs to its end, says something, and leaves nothing behind."""

from pathlib import Path

import pytest
from forked import Script

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    with Script(path, folder=tmp_path, strict=True) as script:
        assert script.wait(300) == 0, script.err
        assert script.out.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_made_of_cells_with_titles(path):
    text = path.read_text()
    assert text.startswith('"""')
    assert "\n# %% " in text

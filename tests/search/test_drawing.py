import itertools

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

from netwright.search import spaces
from netwright.search.drawing import draw
from netwright.search.genotype import DARTS_V2, DASS_90, DASS_95, DASS_99
from netwright.seeding import stream

GENOTYPES = {"v2": DARTS_V2, "90": DASS_90, "95": DASS_95, "99": DASS_99}
GENOTYPES |= {f"micro-{i}": spaces.get("micro-darts").random(stream(i, "draw")) for i in range(4)}


def _boxes(ax):
    ax.figure.canvas.draw()
    return [text.get_window_extent() for text in ax.texts]


@pytest.mark.parametrize("genotype", GENOTYPES.values(), ids=GENOTYPES)
def test_labels_neither_overlap_nor_are_cut(genotype):
    ax = draw(genotype)
    ax.figure.set_dpi(150)
    boxes = _boxes(ax)
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    whole = ax.figure.bbox
    for box in boxes:
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0
        assert box.y1 <= whole.y1
    shapes = [p.get_window_extent() for p in ax.patches if isinstance(p, (Circle, FancyBboxPatch))]
    for a, b in itertools.combinations(shapes, 2):
        assert not a.overlaps(b)
    for text, box in zip(ax.texts, boxes, strict=True):
        if "cell" not in text.get_text():
            assert any(s.x0 <= box.x0 and box.x1 <= s.x1 and s.y0 <= box.y0 and box.y1 <= s.y1 for s in shapes)


def test_every_operation_and_every_edge_is_drawn():
    ax = draw(DARTS_V2)
    labels = [text.get_text() for text in ax.texts]
    assert labels.count("sep conv\n3×3") == 5
    assert labels.count("max pool\n3×3") == 5
    assert labels.count("skip") == 5
    assert labels.count("dil conv\n3×3") == 1
    assert {"normal cell", "reduction cell", "$c_{k-2}$", "$c_k$", "3"} <= set(labels)
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == 2 * (2 * 8 + 4)
    ends = {tuple(arrow.get_path().vertices[[0, -1]].round(3).flatten()) for arrow in arrows}
    assert len(ends) == len(arrows)


def test_parallel_edges_take_different_ways():
    """An operation and the concatenation may both run from one state past the same layers: no two paths are equal."""
    for genotype in GENOTYPES.values():
        ways = [
            p.get_path().vertices.round(2).tobytes() for p in draw(genotype).patches if isinstance(p, FancyArrowPatch)
        ]
        assert len(set(ways)) == len(ways)


def test_normal_and_reduction_cell_stand_side_by_side():
    titles = [text for text in draw(DARTS_V2).texts if "cell" in text.get_text()]
    (x0, y0), (x1, y1) = (text.get_position() for text in titles)
    assert x0 < x1
    assert y0 == y1


def test_given_axes_are_used_and_narrow_ones_stack_the_cells():
    ax = Figure(figsize=(4, 8)).subplots()
    assert draw(DARTS_V2, ax) is ax
    titles = [text.get_position() for text in ax.texts if "cell" in text.get_text()]
    assert titles[0][1] > titles[1][1]
    boxes = _boxes(ax)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_one_cell():
    shared = spaces.get("micro-darts-2-shared").random(stream(0, "draw"))
    assert sum("cell" in text.get_text() for text in draw(shared).texts) == 1
    assert sum(text.get_text() == "$c_k$" for text in draw(shared.normal).texts) == 1

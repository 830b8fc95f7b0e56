"""Pages: one small safe file, the same figures three times, the same bytes every time."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from netwright.page import (
    COLOURS,
    MAX_BYTES,
    Bullets,
    Code,
    Em,
    Figure,
    Images,
    KeyValues,
    Mono,
    Page,
    Paragraph,
    Picture,
    Section,
    Table,
    Value,
    colour,
    document,
    png,
    svg,
    text_of,
)

NASTY = "<script>alert(1)</script>"


class Structure(HTMLParser):
    """Every tag with its attributes, the text, and whether all tags were closed in order."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "image")

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.faults = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data):
        self.text += data

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def chart(label="a", seed=0):
    def paint(canvas):
        ax = canvas.subplots()
        ax.plot(np.random.default_rng(seed).normal(size=20).cumsum(), marker="o", label=label)
        ax.set_title(label)
        ax.legend()

    return Figure(svg(paint), "Read it upwards.", title="Chart", data={"n": 20})


def noise(size, seed):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def page(name="plain"):
    blocks = [
        Paragraph(["It is ", Em("not faster"), " with ", Mono("a`b")]),
        Bullets([name, [Em(name)]]),
        Table([name, "figure"], [[name, Value(0.12345, "12.3 %")], ["none", None]], name),
        KeyValues({name: name, "seconds": 1.5, "n": 3}),
        Code(f"print({name!r})", "python"),
        chart(name),
        chart(name, seed=1),
        Images([Picture(png(noise(16, 2)), name)], name),
    ]
    return Page(name, ["Verdict on ", name], [Section("", blocks), Section(name, blocks, folded=True)], {name: 0.5})


def test_a_page_is_well_formed_and_needs_nothing_from_elsewhere(tmp_path):
    text = page().write(tmp_path).read_text()
    structure = Structure(text)
    assert structure.faults == structure.open == []
    assert not [tag for tag, _ in structure.tags if tag in {"script", "link", "iframe", "object", "base"}]
    sources = structure.attributes("src") + structure.attributes("href")
    assert sources
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert "default-src 'none'" in text


def test_writing_twice_gives_the_same_bytes_in_another_process_too(tmp_path):
    page().write(tmp_path / "a")
    page().write(tmp_path / "b")
    code = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("t", {__file__!r})
t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
t.page().write({str(tmp_path / "c")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    for name in ("report.html", "report.md", "report.json"):
        first = (tmp_path / "a" / name).read_bytes()
        assert first == (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize(
    "name", [NASTY, '" onmouseover="x', "a|b\n# c *d* [e](f) `g`", "$x_1$ \\frac", "\u732b & \u00e9"]
)
def test_names_that_a_user_gives_stay_text_everywhere(name, tmp_path):
    text = page(name).write(tmp_path).read_text()
    structure = Structure(text)
    assert structure.faults == []
    assert not any(tag == "script" for tag, _ in structure.tags)
    assert not any(key.startswith("on") for _, attributes in structure.tags for key in attributes)
    charts = re.findall("<svg.*?</svg>", text, re.DOTALL)
    shown = " ".join(Structure(" ".join(charts)).text.split())
    assert all(word in shown for word in name.split())
    reread = json.loads((tmp_path / "report.json").read_text())
    assert reread["title"] == name
    assert reread["sections"][0]["blocks"][2]["rows"][0] == [name, 0.12345]


def test_markdown_tables_and_emphasis_survive_special_characters():
    text = page("a|b\n# c *d*").markdown()
    assert "| a\\|b \\# c \\*d\\* | 12.3 % |" in text.splitlines()
    assert "- a\\|b \\# c \\*d\\*" in text.splitlines()
    assert "It is *not faster* with `` a`b ``" in text
    assert not any(line.startswith("# c") for line in text.splitlines())


def test_all_three_files_carry_the_same_figures(tmp_path):
    generator = np.random.default_rng(0)
    numbers = generator.normal(size=8).tolist()
    rows = [[f"row {i}", Value(number, f"{number:.5f}")] for i, number in enumerate(numbers)]
    text = Page("t", "v", [Section("s", [Table(["a", "b"], rows)])]).write(tmp_path).read_text()
    markdown = (tmp_path / "report.md").read_text()
    table = json.loads((tmp_path / "report.json").read_text())["sections"][0]["blocks"][0]
    assert [row[1] for row in table["rows"]] == numbers
    for _, number in table["rows"]:
        assert f">{number:.5f}<" in text
        assert f"| {number:.5f} |" in markdown


def test_ids_are_unique_and_every_reference_leads_somewhere():
    text = page().html()
    structure = Structure(text)
    ids = structure.attributes("id")
    assert len(ids) == len(set(ids)) > 20
    wanted = re.findall(r"url\(#([^)]+)\)", text) + [href[1:] for href in structure.attributes("href")]
    assert wanted
    assert set(wanted) <= set(ids)


def test_the_largest_pictures_give_way_until_the_page_is_small_enough(monkeypatch):
    sizes = (8, 64, 32, 96, 16)
    pictures = [Picture(png(noise(size, size)), f"size {size}") for size in sizes]
    whole = Page("t", "v", [Section("s", [Images(pictures), chart()])])
    monkeypatch.setattr(document, "MAX_BYTES", len(whole.html().encode()) - 1)
    text = whole.html()
    assert len(text.encode()) <= document.MAX_BYTES
    assert [p.uri in text for p in pictures] == [True, True, True, False, True]
    assert text.count("Picture left out") == 1
    assert "<svg" in text
    monkeypatch.setattr(document, "MAX_BYTES", 9_500)
    text = whole.html()
    assert len(text.encode()) <= 9_500
    assert "data:image/png" in text
    assert "<svg" not in text
    assert "This chart was left out" in text
    monkeypatch.setattr(document, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="must stay under 100 bytes, got"):
        whole.html()


def test_a_page_full_of_pictures_stays_under_three_megabytes():
    pictures = [Picture(png(noise(300, seed)), str(seed)) for seed in range(90)]
    text = Page("t", "v", [Section("s", [Images(pictures)])]).html()
    assert 0.9 * MAX_BYTES < len(text.encode()) <= MAX_BYTES == 3_000_000


def test_long_tables_are_cut_on_the_page_and_whole_in_the_data():
    table = Table(["i"], [[i] for i in range(800)])
    whole = Page("t", "v", [Section("s", [table])])
    assert whole.html().count("<td") == 500
    assert "300 more rows" in whole.html()
    assert "300 more rows" in whole.markdown()
    assert len(whole.to_dict()["sections"][0]["blocks"][0]["rows"]) == 800


def test_sections_fold_and_figures_are_data():
    text = page().html()
    assert text.count("<details>") == 1
    assert text.index("</section>") < text.index("<details>")
    assert page().to_dict()["figures"] == {"plain": 0.5}
    assert Page("t", "v", figures={"a": float("nan"), "b": np.arange(2)}).to_dict()["figures"] == {
        "a": None,
        "b": [0, 1],
    }


def test_charts_follow_the_colour_scheme_and_keep_foreign_colours():
    def paint(canvas):
        ax = canvas.subplots()
        ax.plot([1, 2], color=colour("orange"))
        ax.plot([2, 1], color="#123456")
        ax.text(0, 1, "#0072b2 1.23456")

    image = svg(paint)
    assert "var(--orange,#d55e00)" in image
    assert "stroke: #123456" in image
    assert ">#0072b2 1.23456<" in image
    assert "font-family" not in image
    for name in COLOURS:
        assert f"--{name}:" in page().html()


def test_drawing_leaves_matplotlibs_settings_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg(lambda canvas: canvas.subplots())
    assert dict(matplotlib.rcParams) == before


def test_the_users_own_settings_do_not_show():
    import matplotlib

    plain = svg(lambda canvas: canvas.subplots().plot([1, 2]))
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        assert svg(lambda canvas: canvas.subplots().plot([1, 2])) == plain


def test_text_is_a_formula_only_where_asked():
    def paint(canvas):
        canvas.subplots().set_title("$c_{k}$")

    assert "$c_{k}$" in svg(paint)
    assert "$" not in svg(paint, formulas=True)


def test_logarithmic_axes_have_numbers_not_formulas():
    def paint(canvas):
        canvas.subplots().loglog([0.1, 10], [1, 1000])

    ticks = re.findall(r">([^<>]+)</text>", svg(paint))
    assert {"0.1", "10", "1000"} <= set(ticks)
    assert not any("$" in tick for tick in ticks)


def test_a_number_and_its_unit_stay_on_one_line_in_html_only():
    whole = Page("t", "It takes 3 ms of 5 min, 95 % of 7 sheep", [Section("s", [Paragraph(Mono("3 ms"))])])
    assert "It takes 3\xa0ms of 5\xa0min, 95\xa0% of 7 sheep" in whole.html()
    assert "<code>3 ms</code>" in whole.html()
    assert "\xa0" not in whole.markdown()


@pytest.mark.parametrize(
    "image",
    [
        "<svg><script>1</script></svg>",
        '<svg><g onload="x"></g></svg>',
        '<svg><image href="http://a/b.png"/></svg>',
        "<svg><foreignObject></foreignObject></svg>",
        "<svg><style>*{}</style></svg>",
    ],
)
def test_a_figure_refuses_what_could_run_or_fetch(image):
    with pytest.raises(ValueError, match="image must not run or fetch anything, got"):
        Figure(image, "x")


def test_bad_input_is_refused_by_name():
    with pytest.raises(ValueError, match="image must be inline SVG that starts with <svg, got '<p>'"):
        Figure("<p>", "x")
    with pytest.raises(ValueError, match="rows must hold 2 cells each, as header does, got 1"):
        Table(["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="title must not be empty"):
        Page(" ", "v")
    with pytest.raises(ValueError, match="verdict must not be empty"):
        Page("t", [])
    with pytest.raises(ValueError, match="width must be > 0, got 0"):
        svg(Canvas.subplots, width=0)
    with pytest.raises(ValueError, match=r"name must be one of ink, .*, got 'pink'"):
        colour("pink")
    with pytest.raises(ValueError, match=r"got \(4, 4, 2\)"):
        png(np.zeros((4, 4, 2)))


def test_pictures_keep_their_pixels_and_large_ones_shrink():
    import io

    pixels = noise(16, 0)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels)))), pixels)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png(pixels / 255)))), pixels)
    assert Image.open(io.BytesIO(png(noise(300, 0)[:150]))).size == (128, 64)
    stretched = np.asarray(Image.open(io.BytesIO(png(np.array([[-1.0, 3.0], [1.0, np.nan]])))))
    assert stretched.tolist() == [[0, 255], [128, 64]]


def test_a_failing_page_leaves_the_old_files(tmp_path, monkeypatch):
    page().write(tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    monkeypatch.setattr(document, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="must stay under"):
        page("other").write(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_texts_for_the_terminal():
    assert text_of("a *b*") == "a *b*"
    assert text_of(["a ", Em("b"), Mono("c")]) == "a *b*c"

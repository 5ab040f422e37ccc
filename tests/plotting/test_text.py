"""Tests of coloured text: every token escaped, colours that follow the values, what styles leave, refusals."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp import plotting
from interp.plotting import coloured_text, raster
from interp.plotting.style import ATTENTION, DIVERGING

NASTY = ["<bos>", " Mary", "<script>alert(1)</script>", '"onclick="x', " $5$", " &amp;", "\n", "\u202e", ""]


class Page(HTMLParser):
    """Text, and the style that each piece of it stands in."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.pieces: list[tuple[str, list[str], str, str]] = []  # text, tags around it, style, title
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append((tag, dict(attrs)))
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        spans = [attrs for tag, attrs in self.open if tag == "span"]
        if spans:
            style, title = (spans[-1].get(name) or "" for name in ("style", "title"))
            self.pieces.append((data, [tag for tag, _ in self.open], style, title))


def background(style: str) -> str:
    return re.findall(r"background:(#\w+)", style)[0] if "background" in style else ""


def test_tokens_are_shown_and_never_obeyed() -> None:
    text = coloured_text(NASTY, np.linspace(-1, 1, len(NASTY)), title="<b>T</b>", labels=["<i>"], unit="<u>")
    page = Page(text.html())
    assert page.tags == {"div", "p", "b", "small", "span"}
    assert page.attributes == {"class", "style", "title"}
    shown = ["<bos>", " Mary", "<script>alert(1)</script>", '"onclick="x', " $5$", " &amp;", "↵", "\\u202e", '""']
    assert [piece[0] for piece in page.pieces] == shown
    assert "mathjax_ignore" in text.html()  # else $5$ would be a formula
    assert text._repr_html_() == text.html()


def test_colours_follow_the_values_from_end_to_end() -> None:
    page = Page(coloured_text(list("abcde"), [-2.0, -1.0, 0.0, 2.0, np.nan]).html())
    colours = [background(style) for _, _, style, _ in page.pieces]
    assert colours[0] == DIVERGING[0] and colours[2] == DIVERGING[5] and colours[3] == DIVERGING[-1]
    assert colours[1] == "#e58268"  # 2.5 steps along: halfway from #d6604d to #f4a582
    assert colours[4] == ""  # not measured
    assert [title for *_, title in page.pieces] == ["-2", "-1", "0", "2", ""]
    one_sided = [background(s) for _, _, s, _ in Page(coloured_text(list("abc"), [0.0, 3.0, 1.5]).html()).pieces]
    assert one_sided[:2] == [ATTENTION[0], ATTENTION[-1]]
    assert one_sided[2] == "#70aed4"  # halfway from #9ecae1 to #4292c6
    # beyond the limit the end colours, below zero of a one-sided scale white
    clipped = Page(coloured_text(list("abc"), [9.0, 2.0, -1.0], signed=False, limit=2).html()).pieces
    assert [background(style) for _, _, style, _ in clipped] == [ATTENTION[-1], ATTENTION[-1], ATTENTION[0]]


def test_text_is_dark_on_light_and_light_on_dark() -> None:
    page = Page(coloured_text(list("abc"), [-1.0, 0.0, 1.0]).html())
    inks = [re.findall(r";color:(#\w+)", style)[0] for _, _, style, _ in page.pieces]
    assert inks == ["#ffffff", "#222222", "#ffffff"]


def test_the_limit_is_shared_by_all_lines_and_marks_survive_without_styles() -> None:
    text = coloured_text(
        [["a", " b"], [" c", " d", "e"]], [torch.tensor([1.0, 4.0]), [0.0, 2.0, np.nan]], marks=[1, None],
        labels=["first", "x"], title="T", unit="activation",
    )  # fmt: skip
    assert text.limit == 4.0 and not text.signed
    page = Page(text.html())
    assert [piece[0] for piece in page.pieces if "b" in piece[1]] == [" b"]
    assert background(page.pieces[1][2]) == ATTENTION[-1] != background(page.pieces[3][2])
    assert "activation: 0 white, 4 blue" in text.html()
    assert str(text) == "T\nfirst  a [[b]]\n    x   c de"  # 2 is not above half of the limit
    assert str(coloured_text(["a", " b"], [-3.0, 1.0])) == "[a] b"
    assert str(coloured_text(["a", "b"], [1.0, 0.0], glue=" ")) == "[a] b"
    assert repr(text) == "ColouredText(2 lines, 5 tokens; 'T')"


def test_all_zero_and_unmeasured_values_have_a_scale() -> None:
    assert coloured_text(["a", "b"], [0.0, np.nan]).limit == 1.0
    assert coloured_text(["a"], [np.nan]).limit == 1.0


def test_the_figure_aligns_marks_and_writes_every_token() -> None:
    lines = [["<s>", " b"], [" $c$", " d", " e", " longer than fourteen"]]
    text = coloured_text(
        lines, [[1.0, -4.0], [0.5, 2.0, 3.0, np.nan]], marks=[1, 2], labels=["7.5", "0"], title="T", unit="u"
    )
    figure = text.figure()
    grid = np.asarray(figure.data[0].z, dtype=float)  # type: ignore[attr-defined]
    expected = [[np.nan, 1.0, -4.0, np.nan], [0.5, 2.0, 3.0, np.nan]]
    np.testing.assert_array_equal(grid, expected)
    notes = {(a.x, a.y): a.text for a in figure.layout.annotations if a.xref == "x"}  # type: ignore[attr-defined]
    assert notes == {
        (-1, 0): "&lt;s&gt;", (0, 0): "<b>␣b</b>",
        (-2, 1): "␣&#36;c&#36;", (-1, 1): "␣d", (0, 1): "<b>␣e</b>", (1, 1): "␣longer␣than␣…",
    }  # fmt: skip
    layout: Any = figure.layout
    assert (layout.coloraxis.cmin, layout.coloraxis.cmax) == (-4.0, 4.0)
    canvas = raster.draw(figure)
    to_cell = canvas.axes[0].transData.inverted()
    found = {t.get_text(): to_cell.transform(canvas.transFigure.transform(t.get_position())) for t in canvas.texts}
    np.testing.assert_allclose(found["␣b"], [0, 0], atol=1e-6)  # not at the height that its label names
    np.testing.assert_allclose(found["␣$c$"], [-2, 1], atol=1e-6)
    assert plotting.png_bytes(figure, renderer="matplotlib", scale=1).startswith(b"\x89PNG")
    unmarked = coloured_text(lines, [[1.0, 4.0], [0.5, 2.0, 3.0, 0.0]]).figure()
    assert list(unmarked.data[0].x) == [0, 1, 2, 3]  # type: ignore[attr-defined]


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    text = coloured_text(["Zür", "ich"], [1.0, 0.0], title="<T>")
    path = text.save_html(tmp_path / "a" / "text.html")
    page = path.read_text(encoding="utf-8")
    assert text.html() in page and "<title>&lt;T&gt;</title>" in page and 'charset="utf-8"' in page


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"lines of \[2\] tokens have values of shapes \[\(3,\)\]"):
        coloured_text(["a", "b"], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"there is no text: 2 lines, of \[1, 0\] tokens"):
        coloured_text([["a"], []], [[1.0], []])
    with pytest.raises(ValueError, match="is the string 'abc'"):
        coloured_text("abc", [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="value 1 is infinite; use NaN"):
        coloured_text(["a", "b"], [1.0, np.inf])
    with pytest.raises(ValueError, match="got 2 marks for 1 lines"):
        coloured_text(["a"], [1.0], marks=[0, 0])
    with pytest.raises(ValueError, match="got 0 labels for 1 lines"):
        coloured_text(["a"], [1.0], labels=[])
    with pytest.raises(ValueError, match="mark 1 is not a place in a line of 1 tokens"):
        coloured_text(["a"], [1.0], marks=[1])
    with pytest.raises(ValueError, match="limit=0"):
        coloured_text(["a"], [1.0], limit=0)
    with pytest.raises(ValueError, match=r"20001 tokens are more than a text may hold \(20000\)"):
        coloured_text(["a"] * 20_001, np.zeros(20_001))
    with pytest.raises(ValueError, match=r"2001 tokens are more than a figure may hold \(2000\)"):
        coloured_text(["a"] * 2001, np.zeros(2001)).figure()

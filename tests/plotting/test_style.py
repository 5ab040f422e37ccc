"""Tests of labels, colours and the layout that every figure gets."""

from __future__ import annotations

import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp.plotting.style import (
    PALETTE,
    ROLE_COLOURS,
    apply_layout,
    escape,
    series_colours,
    to_numpy,
    token_labels,
    unescape,
    visible_token,
)


@pytest.mark.parametrize(
    ("token", "seen"),
    [
        (" Mary", "␣Mary"),
        ("Mary", "Mary"),
        ("ĠMary", "␣Mary"),
        ("▁Mary", "␣Mary"),
        ("a b  ", "a␣b␣␣"),
        ("\n\n", "↵↵"),
        ("Ċ", "↵"),
        ("\t", "⇥"),
        ("", '""'),
        ("\x00\u200b", "\\x00\\u200b"),
        ("<bos>", "<bos>"),
        ("naïve 日本", "naïve␣日本"),
    ],
)
def test_visible_token_shows_what_a_reader_cannot_see(token: str, seen: str) -> None:
    assert visible_token(token) == seen


def test_token_labels_are_unique_and_number_only_repeated_tokens() -> None:
    assert token_labels([" a", " b", " a", "a"]) == ["␣a [0]", "␣b", "␣a [2]", "a"]
    assert token_labels([" a", " a"], positions=[7, 9]) == ["␣a [7]", "␣a [9]"]
    assert token_labels(["x" * 99]) == ["x" * 27 + "…"]
    with pytest.raises(ValueError, match="2 tokens but 3 positions"):
        token_labels(["a", "b"], [0, 1, 2])


@given(st.text(max_size=20))
def test_escaped_text_has_no_markup_and_reads_back(text: str) -> None:
    escaped = escape(text)
    assert not set(escaped) & set("<>$")
    assert unescape(escaped) == text


def test_a_role_has_its_colour_and_no_other_series_takes_it() -> None:
    colours = series_colours(["method A", "denoise", "method B", "clean"])
    assert colours[1] == ROLE_COLOURS["denoise"] and colours[3] == ROLE_COLOURS["clean"]
    assert len(set(colours)) == 4
    assert series_colours(["a", "b"]) == list(PALETTE[:2])


def test_layout_is_the_figures_own_whatever_the_sessions_template_is() -> None:
    figure = apply_layout(go.Figure(), title="Effect <of> x", width=300, height=200, margin={"l": 1})
    assert figure.layout.template.layout == go.layout.Template().layout
    assert figure.layout.template.layout != pio.templates[pio.templates.default].layout
    assert figure.layout.title.text == "Effect &lt;of&gt; x"
    assert (figure.layout.paper_bgcolor, figure.layout.width) == ("white", 300)


def test_to_numpy_takes_tensors_that_numpy_refuses() -> None:
    tensor = torch.tensor([1.5, 2.5], dtype=torch.bfloat16, requires_grad=True)
    assert to_numpy(tensor).tolist() == [1.5, 2.5]
    assert to_numpy([1, 2]).tolist() == [1, 2]

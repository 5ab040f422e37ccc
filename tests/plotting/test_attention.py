"""Tests of the attention view: stored weights, size, no network, safety of tokens, the page in a real browser."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from interp import plotting

TOKENS = ["<bos>", " Mary", ' "', " &amp;", " </script><b>", "'", " $x$", "\n", " 日本", " Mary"] * 3


def patterns(heads: int = 12, n: int = 30, causal: bool = True, sharpness: float = 3.0) -> np.ndarray:
    scores = np.random.default_rng(0).normal(size=(heads, n, n)) * sharpness
    if causal:
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def stored(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def decoded(page: str) -> np.ndarray:
    """The pattern as the page's own script reads it."""
    data = stored(page)
    n, heads = len(data["tokens"]), len(data["labels"])
    packed = np.frombuffer(base64.b64decode(data["pattern"]), dtype=np.uint8).reshape(heads, -1)
    pattern = np.zeros((heads, n, n))
    for dest in range(n):
        for src in range(dest + 1 if data["causal"] else n):
            pattern[:, dest, src] = packed[:, dest * (dest + 1) // 2 + src if data["causal"] else dest * n + src] / 255
    return pattern


@pytest.mark.parametrize("causal", [True, False])
def test_stored_weights_are_within_half_a_step(causal: bool) -> None:
    pattern = patterns(causal=causal)
    page = plotting.attention_view(pattern, TOKENS).html()
    assert stored(page)["causal"] is causal
    assert np.abs(decoded(page) - pattern).max() <= 0.5 / 255 + 1e-7


def test_page_is_small_and_loads_nothing() -> None:
    view = plotting.attention_view(patterns(), TOKENS)
    for page in (view.html(), view._repr_html_()):
        assert len(page.encode()) < 100_000
        assert not re.search(r"https?://|//cdn|@import|url\(|<link|<img|src=", page.replace("srcdoc=", ""))
        assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(", page)


def test_tokens_and_titles_cannot_become_markup() -> None:
    view = plotting.attention_view(
        patterns(2), TOKENS, title='</title><script>alert("&")</script>', labels=["<i>", "b"]
    )
    page = view.html()
    assert page.count("<script") == 2 and page.count("</script>") == 2  # the data and the program
    assert "<b>" not in page and "<i>" not in page
    assert stored(page)["tokens"][:5] == ["<bos>", "␣Mary", '␣"', "␣&amp;", "␣</script><b>"]
    assert "<title>&lt;/title&gt;&lt;script&gt;alert(&quot;&amp;&quot;)" in page
    frame = re.fullmatch(r'<iframe [^>]*srcdoc="([^"]*)"></iframe>', view._repr_html_())
    assert frame and html.unescape(frame[1]) == page
    assert 'sandbox="allow-scripts"' in view._repr_html_()


def test_labels_come_from_the_coordinates() -> None:
    pattern = patterns(4, 3)
    array = xr.DataArray(pattern.reshape(2, 2, 3, 3), dims=("layer", "head", "dest", "src"), coords={"layer": [3, 5]})
    view = plotting.attention_view(array.transpose("dest", "head", "src", "layer"), list("abc"))
    assert view.labels == ("L3H0", "L3H1", "L5H0", "L5H1")
    np.testing.assert_array_equal(view.pattern, pattern.astype(np.float32))
    assert plotting.attention_view(array.sel(layer=5), list("abc")).labels == ("L5H0", "L5H1")
    assert plotting.attention_view(array.assign_coords(head=[6, 7])[1, 1], list("abc")).labels == ("L5H7",)
    tensor = torch.tensor(pattern, dtype=torch.bfloat16)
    assert plotting.attention_view(tensor, list("abc")).labels == ("H0", "H1", "H2", "H3")


def test_figure_draws_the_same_heads_with_the_first_position_at_the_top() -> None:
    pattern = patterns(3, 4)
    figure = plotting.attention_view(pattern, [" a", "b", " a", "c"], labels=["L0H0", "L0H1", "L0H2"]).figure([2, 0])
    np.testing.assert_array_equal([trace.z for trace in figure.data], pattern[[2, 0]].astype(np.float32))
    assert [note.text for note in figure.layout.annotations] == ["L0H2", "L0H0"]
    assert list(figure.data[0].x) == list(figure.data[0].y) == ["␣a [0]", "b", "␣a [2]", "c"]
    assert figure.layout.yaxis.autorange == "reversed"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert figure.layout.xaxis.title.text == "Source position (token)"
    with pytest.raises(ValueError, match=r"heads \[3\] do not exist"):
        plotting.attention_view(pattern, list("abcd")).figure([3])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\) but 3 tokens need \[head, 3, 3\]"),
        (np.zeros((3, 3)), r"shape \(3, 3\) but 3 tokens need \[head, 3, 3\]"),
        (np.full((1, 3, 3), np.nan), r"pattern\[0, 0, 0\] = nan is not a weight"),
        (np.full((1, 3, 3), -2.0), r"= -2 is not a weight from 0 to 1.*after softmax"),
        (xr.DataArray(np.zeros((2, 1, 3, 3)), dims=("example", "head", "dest", "src")), r"isel\(example=0\)"),
    ],
)
def test_refusals_say_what_to_do(pattern: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.attention_view(pattern, list("abc"))


def test_further_refusals() -> None:
    with pytest.raises(ValueError, match=r"12 heads x 300 x 300 = 1080000 weights.*500000"):
        plotting.attention_view(np.zeros((12, 300, 300)), ["a"] * 300)
    with pytest.raises(ValueError, match="got 1 labels for 2 heads"):
        plotting.attention_view(np.zeros((2, 1, 1)), ["a"], labels=["x"])
    with pytest.raises(ValueError, match="start=2"):
        plotting.attention_view(np.zeros((2, 1, 1)), ["a"], start=2)


@pytest.mark.skipif(plotting.find_browser() is None, reason="no browser on this machine")
def test_page_answers_to_mouse_and_keys_in_a_browser(tmp_path: Path) -> None:
    pattern = patterns(3, 10, sharpness=0.5)  # no weight rounds to zero
    view = plotting.attention_view(pattern, TOKENS[:10], labels=["L0H0", "L0H1", "L0H2"], start=1)
    seen = asyncio.run(_drive(view.save_html(tmp_path / "view.html").as_uri()))
    head, dest, weights = seen["attends"]
    assert (head, dest) == ("L0H2", 4)
    expected = np.sort(pattern[2, 4])[::-1][:5]
    np.testing.assert_allclose(weights, expected, atol=0.5 / 255 + 0.0005)
    head, src, weights = seen["attended"]
    assert (head, src) == ("L0H1", 0)
    np.testing.assert_allclose(weights, np.sort(pattern[1, :, 0])[::-1][:5], atol=0.5 / 255 + 0.0005)
    assert seen["start"] == "L0H1"
    assert seen["tokens"][:5] == ["<bos>", "␣Mary", '␣"', "␣&amp;", "␣</script><b>"]
    assert seen["errors"] == []


async def _drive(address: str) -> dict[str, Any]:
    """Hover over a token of another head with the mouse, then move back and to the first token with the keys."""
    import choreographer

    chosen = "document.querySelector('#heads [aria-checked=true]').textContent"
    state = (
        f"[{chosen}, [...document.querySelectorAll('#tokens span')].findIndex((s) => s.className === 'from'), "
        "[...document.querySelectorAll('#status td:last-child')].map((cell) => Number(cell.textContent))]"
    )
    async with choreographer.Browser() as browser:
        tab = await browser.create_tab("about:blank")

        async def run(code: str) -> Any:
            answer = await tab.send_command(
                "Runtime.evaluate", params={"expression": f"JSON.stringify({code})", "returnByValue": True}
            )
            text = answer["result"]["result"].get("value")
            return None if text is None else json.loads(text)

        async def mouse(selector: str, *kinds: str) -> None:
            box = await run(f"document.querySelector('{selector}').getBoundingClientRect()")
            for kind in kinds:
                where = {"x": box["x"] + 5, "y": box["y"] + 5, "button": "left", "clickCount": 1}
                await tab.send_command("Input.dispatchMouseEvent", params={"type": kind, **where})

        async def key(name: str) -> None:
            for kind in ("keyDown", "keyUp"):
                await tab.send_command("Input.dispatchKeyEvent", params={"type": kind, "key": name, "code": name})

        script = "window.failures = []; window.addEventListener('error', (event) => failures.push(event.message));"
        await tab.send_command("Page.enable")
        await tab.send_command("Page.addScriptToEvaluateOnNewDocument", params={"source": script})
        await tab.send_command("Page.navigate", params={"url": address})
        for _ in range(100):
            if await run("document.querySelectorAll('#status td').length"):
                break
            await asyncio.sleep(0.05)
        seen: dict[str, Any] = {"start": await run(chosen)}
        seen["tokens"] = await run("[...document.querySelectorAll('#tokens span')].map((s) => s.textContent)")
        await mouse("#heads button:nth-of-type(3)", "mousePressed", "mouseReleased")
        await mouse("#tokens span:nth-of-type(5)", "mouseMoved")
        seen["attends"] = await run(state)
        await run("document.querySelector('#heads [tabindex=\"0\"]').focus()")
        await key("ArrowLeft")
        await run("document.querySelector('#ways input[value=src]').click()")
        await run("document.querySelector('#tokens [tabindex=\"0\"]').focus()")
        await key("Home")
        seen["attended"] = await run(state)
        seen["errors"] = await run("failures")
        return seen

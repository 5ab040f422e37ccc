"""Figures as files: PNG through a headless browser or matplotlib, and self-contained HTML."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import plotly.graph_objects as go

from interp.plotting import browser
from interp.plotting.browser import find_browser

Renderer = Literal["auto", "kaleido", "matplotlib"]


class PNG(bytes):
    """PNG bytes that know which renderer drew them: `.renderer` is `"kaleido"` or `"matplotlib"`, `.why` the reason."""

    renderer: str
    why: str

    def __new__(cls, data: bytes, renderer: str, why: str) -> PNG:
        self = super().__new__(cls, data)
        self.renderer = renderer
        self.why = why
        return self


class SavedPNG(NamedTuple):
    """Where a PNG was written and which renderer drew it, with the reason."""

    path: Path
    renderer: str
    why: str


def png_bytes(
    figure: go.Figure,
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
    renderer: Renderer = "auto",
) -> PNG:
    """The figure as PNG: drawn by a headless browser where there is one, otherwise by matplotlib.

    The first call starts the browser (about two seconds), later calls share it. matplotlib draws every figure that this
    package makes from the same data, with the same colours and labels.

    Args:
        width, height: Size in layout pixels; the figure's own by default.
        scale: Image pixels per layout pixel.
        renderer: `"auto"`, or one of the two by name, which raises where it is not possible.

    Returns:
        The bytes, with `.renderer` and `.why`. If a browser exists but does not start, matplotlib draws and a warning
        says so.

    Raises:
        TypeError: If `figure` is not a plotly figure.
        RuntimeError: If `renderer="kaleido"` and there is no working browser, or neither a browser nor matplotlib.
        NotImplementedError: If matplotlib must draw a kind of trace that it does not know; the message lists the known.
    """
    if not isinstance(figure, go.Figure):
        raise TypeError(
            f"png_bytes needs a plotly Figure but got {type(figure).__name__}; an AttentionView has .figure()"
        )
    if renderer not in ("auto", "kaleido", "matplotlib"):
        raise ValueError(f"renderer must be 'auto', 'kaleido' or 'matplotlib', got {renderer!r}")
    width = width or figure.layout.width or 700  # type: ignore[union-attr]
    height = height or figure.layout.height or 450  # type: ignore[union-attr]
    if renderer == "matplotlib":
        return _with_matplotlib(figure, width, height, scale, "asked for")
    path = find_browser()
    if path is None:
        missing = "no browser found: install Chrome or Chromium, or set BROWSER_PATH to one (and install kaleido)"
        if renderer == "kaleido":
            raise RuntimeError(missing)
        return _with_matplotlib(figure, width, height, scale, missing)
    try:
        data = browser.render(figure.to_dict(), width=width, height=height, scale=scale)
    except browser.BrowserError as error:
        if renderer == "kaleido":
            raise
        warnings.warn(f"{error}; matplotlib drew the figure instead", RuntimeWarning, stacklevel=2)
        return _with_matplotlib(figure, width, height, scale, str(error))
    return PNG(_checked(data), "kaleido", f"browser at {path}")


def save_png(
    figure: go.Figure,
    path: str | os.PathLike[str],
    *,
    width: int | None = None,
    height: int | None = None,
    scale: float | int = 2,
    renderer: Renderer = "auto",
) -> SavedPNG:
    """Write the figure as a PNG file and say which renderer drew it. Arguments and errors as for `png_bytes`."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise ValueError(f"save_png writes PNG files but the path is {str(target)!r}; name it {target.stem}.png")
    data = png_bytes(figure, width=width, height=height, scale=scale, renderer=renderer)
    _write(target, data)
    return SavedPNG(target, data.renderer, data.why)


def save_html(
    figure: Any, path: str | os.PathLike[str], *, plotlyjs: Literal["inline", "directory"] = "inline"
) -> Path:
    """Write a figure, or an `AttentionView`, as an HTML page that needs no network.

    Args:
        plotlyjs: `"inline"` puts plotly.js into the page (4.8 MB); `"directory"` writes it once as `plotly.min.js`
            beside the page, for folders of many figures. An `AttentionView` needs neither.
    """
    target = Path(path)
    if hasattr(figure, "save_html"):
        return figure.save_html(target)
    if not isinstance(figure, go.Figure):
        raise TypeError(f"save_html needs a plotly Figure or an AttentionView but got {type(figure).__name__}")
    if plotlyjs not in ("inline", "directory"):
        raise ValueError(f"plotlyjs must be 'inline' or 'directory', got {plotlyjs!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(target, include_plotlyjs=True if plotlyjs == "inline" else "directory", include_mathjax=False)
    return target


def _with_matplotlib(figure: go.Figure, width: int, height: int, scale: float | int, why: str) -> PNG:
    try:
        from interp.plotting.raster import draw, to_png
    except ImportError as error:
        raise RuntimeError(f"cannot draw a PNG: {why}, and {error}; run pip install 'interp[png]'") from error
    return PNG(_checked(to_png(draw(figure, width=width, height=height), scale)), "matplotlib", why)


def _checked(data: bytes) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise RuntimeError(f"the renderer returned {len(data)} bytes that are not a PNG image")
    return data


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file that is there whole or not at all, whatever stops the writing."""
    target = Path(path)
    _write(target, text.encode("utf-8"))
    return target


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)

"""The report: a front page with a card per study, and a page per study.

Pages need no network. A plotly figure is on its page twice: as the PNG that the notebook carries, which every browser
shows and prints, and as data, which the one `plotly.min.js` beside the pages turns into the interactive figure. The
front page holds everything in itself. nbconvert's HTML was not used because its templates load scripts from a network.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from interp.studies.running import Check, StudyRun

PLOTLY_MIME = "application/vnd.plotly.v1+json"


def write_report(runs: Sequence[StudyRun], out: str | os.PathLike[str]) -> Path:
    """Write `index.html` and a page per run into `out`; returns the path of the front page.

    Pages of earlier runs with the same names are replaced, others are left alone but not linked.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    pages = {run.page: _study_page(run, folder) for run in runs}
    if any(_PLOTLY_SCRIPT in page for page in pages.values()):
        from plotly.offline import get_plotlyjs

        (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    index = folder / "index.html"
    index.write_text(_front_page(runs), encoding="utf-8")
    return index


def card_figure(notebook: Any) -> str | None:
    """The PNG (base64) for the card of a study: of the cell tagged `card`, otherwise the first; None without any."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "card" in cell.metadata.get("tags", [])]
    for cell in tagged + code:
        for output in cell.outputs:
            picture = _png(output.get("data", {}))
            if picture is not None:
                return picture
    return None


def _front_page(runs: Sequence[StudyRun]) -> str:
    import interp

    passed = sum(run.count("passed") for run in runs)
    broken = sum(not run.ok for run in runs)
    facts = [
        f"{len(runs)} {'study' if len(runs) == 1 else 'studies'}",
        f"{passed} asserts passed",
        f"{broken} stopped" if broken else "",
        f"run time {_duration(sum(run.seconds for run in runs))}",
        f"interp {interp.__version__}",
        datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    ]
    body = f"""
<header class="front"><h1>Studies</h1>
<p class="lead">Each study asks one question of one model and checks every claim that it makes with an assert.</p>
<p class="facts">{" · ".join(fact for fact in facts if fact)}</p></header>
<main class="cards">{"".join(_card(run) for run in runs)}</main>"""
    return _document("Studies", body)


def _card(run: StudyRun) -> str:
    picture = card_figure(run.notebook)
    image = (
        f'<img src="data:image/png;base64,{picture}" alt="A figure of the study {html.escape(run.study.title)}">'
        if picture
        else '<span class="nofigure">no figure</span>'
    )
    trouble = f'<p class="trouble">{html.escape(_shortened(run.error, 160))}</p>' if run.error else ""
    return f"""
<a class="card" href="{html.escape(run.page)}.html"><figure>{image}</figure>
<div class="text"><h2>{html.escape(run.study.title)}</h2>
<p>{_inline(run.study.question)}</p>{trouble}
<footer>{_badge(run)}{_facts(run)}</footer></div></a>"""


def _study_page(run: StudyRun, folder: Path) -> str:
    body = [
        f'<nav><a href="index.html">← All studies</a></nav><div class="status">{_badge(run)}{_facts(run)}</div>',
        f'<div class="error banner">{html.escape(run.error)}</div>' if run.error else "",
        _checklist(run.checks),
        "<main>",
    ]
    statuses: dict[int, list[Check]] = {}
    for check in run.checks:
        statuses.setdefault(check.cell, []).append(check)
    for index, cell in enumerate(run.notebook.cells):
        if cell.cell_type == "markdown":
            body.append(f'<section class="prose">{_markdown(cell.source)}</section>')
        elif cell.cell_type == "code" and cell.source.strip():
            body.append(_code_cell(index, cell, statuses.get(index, [])))
    body.append("</main>")
    files = sorted(p for p in (folder / f"{run.page}.files").rglob("*") if p.is_file())
    if files:
        links = (f'<li><a href="{html.escape(name)}">{html.escape(name)}</a></li>' for name in _relative(files, folder))
        body.append(f'<section class="prose"><h2>Files</h2><ul>{"".join(links)}</ul></section>')
    text = "\n".join(body)
    script = _PLOTLY_SCRIPT if 'class="output plotly"' in text else ""
    return _document(run.study.title, f'<div class="page">{text}</div>{script}{_SCRIPT}')


def _code_cell(index: int, cell: Any, checks: list[Check]) -> str:
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    code = highlight(cell.source, PythonLexer(), HtmlFormatter(nowrap=True))
    outputs = "".join(_output(output) for output in cell.outputs)
    marks = "".join(
        f'<span class="mark {_CSS[c.status]}" title="{html.escape(c.source)}">{_SIGN[c.status]}</span>' for c in checks
    )
    line = f'<div class="marks">{marks}</div>' if marks else ""
    return f'<section class="cell" id="cell-{index}"><pre class="code">{code}</pre>{line}{outputs}</section>'


def _checklist(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    lines = [f'<a href="#cell-{c.cell}"><code>{html.escape(_shortened(c.source, 200))}</code></a>' for c in checks]
    rows = "".join(f'<li class="{_CSS[c.status]}">{line}</li>' for c, line in zip(checks, lines, strict=True))
    opened = " open" if any(c.status != "passed" for c in checks) else ""
    return f'<details class="checks"{opened}><summary>What is checked</summary><ul>{rows}</ul></details>'


def _output(output: Any) -> str:
    kind = output.output_type
    if kind == "stream":
        return f'<pre class="output {output.name}">{html.escape(_plain(output.text))}</pre>'
    if kind == "error":
        return f'<pre class="output error">{html.escape(_plain(chr(10).join(output.traceback)))}</pre>'
    data = output.data
    picture = _png(data)
    if picture is not None:
        image = f'<img src="data:image/png;base64,{picture}" alt="{html.escape(_figure_title(data))}">'
        if PLOTLY_MIME not in data:
            return f'<div class="output">{image}</div>'
        figure = json.dumps(data[PLOTLY_MIME]).replace("</", "<\\/")
        return f'<div class="output plotly">{image}<script type="application/json">{figure}</script></div>'
    if "image/svg+xml" in data:
        return f'<div class="output">{data["image/svg+xml"]}</div>'
    if "text/html" in data:
        text = data["text/html"]
        if re.search(r"<(script|html|body)\b", text, re.IGNORECASE):
            # A whole view with its own script and styles: kept apart from the page's.
            return f'<iframe class="output" srcdoc="{html.escape(text)}"></iframe>'
        return f'<div class="output table">{text}</div>'
    if "text/markdown" in data:
        return f'<div class="output prose">{_markdown(data["text/markdown"])}</div>'
    return f'<pre class="output">{html.escape(_plain(data.get("text/plain", "")))}</pre>'


def _png(data: Any) -> str | None:
    """The PNG of an output in base64; drawn here for a plotly figure that comes without one."""
    if "image/png" in data:
        return "".join(data["image/png"].split())
    if PLOTLY_MIME in data:
        import plotly.graph_objects as go

        from interp.plotting import png_bytes

        return base64.b64encode(png_bytes(go.Figure(data[PLOTLY_MIME], skip_invalid=True))).decode("ascii")
    return None


def _figure_title(data: Any) -> str:
    title = data.get(PLOTLY_MIME, {}).get("layout", {}).get("title", {})
    text = title.get("text", "") if isinstance(title, dict) else str(title)
    return re.sub(r"<[^>]+>", " ", text or "") or "figure"


def _markdown(source: str) -> str:
    import mistune

    return str(mistune.create_markdown(escape=False, plugins=["table", "strikethrough", "math", "url"])(source))


def _inline(source: str) -> str:
    # The card is one link, and a link inside a link is not HTML.
    text = re.sub(r"</?a\b[^>]*>", "", _markdown(source).strip())
    return text.removeprefix("<p>").removesuffix("</p>")


def _badge(run: StudyRun) -> str:
    colour = "failed" if not run.ok else "passed" if run.checks else "missed"
    return f'<span class="badge {colour}">{_SIGN["passed" if run.ok else "failed"]} {run.verdict}</span>'


def _facts(run: StudyRun) -> str:
    model = f'<span class="model">{html.escape(run.model)}</span>' if run.model else ""
    return f'<span class="run">{model} {_duration(run.seconds)}</span>'


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).rstrip("\n")


def _shortened(text: str | None, length: int) -> str:
    text = text or ""
    return text if len(text) <= length else text[: length - 1] + "…"


def _relative(files: Sequence[Path], folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in files]


def _document(title: str, body: str) -> str:
    from pygments.formatters import HtmlFormatter

    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    code = HtmlFormatter(style="friendly").get_style_defs("pre.code")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{code}
{style}</style></head><body>{body}</body></html>
"""


_SIGN = {"passed": "✓", "failed": "✗", "not reached": "·"}
_CSS = {"passed": "passed", "failed": "failed", "not reached": "missed"}

_PLOTLY_SCRIPT = '<script src="plotly.min.js"></script>'
_SCRIPT = """<script>
if (window.Plotly) for (const box of document.querySelectorAll(".plotly")) {
  const {data, layout} = JSON.parse(box.querySelector("script").textContent);
  const place = document.createElement("div");
  box.prepend(place);
  Plotly.newPlot(place, data, layout, {displaylogo: false, responsive: true})
    .then(() => box.querySelector(":scope > img").remove(), () => place.remove());
}
for (const frame of document.querySelectorAll("iframe")) {
  const fit = () => {
    frame.style.height = 0;
    frame.style.height = frame.contentDocument.documentElement.scrollHeight + 4 + "px";
  };
  frame.addEventListener("load", fit);
  if (frame.contentDocument.readyState === "complete") fit();
}
</script>"""

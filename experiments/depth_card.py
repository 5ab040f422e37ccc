# ruff: noqa: E501  (the lines of the card are prose and tables)
"""Write the card of the depth study (its README.md) from its tables, so that no result in it is typed by hand.

python experiments/depth_card.py data/depth_study
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

MAIN = ["AtP", "IG", "RelP", "RelP + AH", "GIM"]
DIVERGED = 5  # errors of more than five times all effects
TYPES = {"gpt": "GPT-2 type", "llama": "Llama type"}
CORRUPTIONS = {"s2_io_flip": "S2 flipped to IO", "abc": "three other names"}


def main() -> None:
    directory = Path(sys.argv[1])
    (directory / "README.md").write_text(card(directory), encoding="utf-8")


def card(directory: Path) -> str:
    """The card of the tables in a directory."""
    frames = {name: pd.read_csv(directory / f"{name}.csv") for name in ("models", "agreement", "layers", "modules")}
    models, agreement = frames["models"], frames["agreement"]
    one = models.iloc[0]
    parts = [
        f"""# Depth study

How well cheap scores stand in for exact activation patching in models of {_list(models.layers.unique())} layers. Written by `experiments/depth_study.py` (its `train` and `compare`); this card by `experiments/depth_card.py`. The weights are not kept: `train` makes them again.

The models differ in depth and type alone: width 64, 4 heads, rows of 32 tokens, {one.tokens:,} tokens of `interp.tinyworld` text (36 % of the words indirect objects), the same rows in the same order. {models[["arch", "layers", "seed"]].drop_duplicates().seed.nunique()} seed, so a difference between two depths is a difference between two models.

Indirect-object prompts of template 0, denoising, logit difference, cells are (layer, position). Two corruptions: {CORRUPTIONS["s2_io_flip"]} (`s2_io_flip`, one word differs) and {CORRUPTIONS["abc"]} (`abc`, three words differ). Intervals are 95 % percentile bootstraps over prompts.

| file | one row for each | columns |
|---|---|---|
| `models.csv` | model, corruption | `clean`, `corrupted`: mean logit difference; `right`: share of prompts on which the answer beats the foil; `learned`: whether its lower bound reaches 0.9, or the model is not compared |
| `agreement.csv` | model, corruption, site, method | `pearson`, `spearman`, `precision` and `sign` (of the 5 largest) of `interp.patching.agreement`; `error`: sum of abs(score - exact) over sum of abs(exact); `slope`: best fit of scores to exact effects through the origin; `forwards`, `backwards`: cost in batches |
| `layers.csv` | the same and layer, for {_list(MAIN)} | `share` of all exact effects that lies in the layer; `pearson`, `error`, `slope` over its positions |
| `modules.csv` | model, corruption, site, kind of module | exact patching with all modules of the kind (`norm`, `attention`, `mlp`) replaced by their tangents, against exact patching; all three at once would be AtP. `attention and mlp` leaves only the norms as they are. First 32 prompts (`experiments/linearised.py`) |

Columns `*_low` and `*_high` are the bounds. "alone" in a method's name: that rule and gradients elsewhere.

## The task
""",
        _table(
            ["type", "layers", "corruption", "clean", "corrupted", "right", "learned"],
            [
                [TYPES[r.arch], r.layers, r.corruption, f"{r.clean:.1f}", f"{r.corrupted:.1f}",
                 f"{r.right:.2f} [{r.right_low:.2f}, {r.right_high:.2f}]", "yes" if r.learned else "no"]
                for r in _rows(models)
            ],
        ),
    ]  # fmt: skip
    for statistic, says in (
        ("pearson", "Pearson over (layer, position)"),
        ("error", "Relative error, lower is better"),
    ):
        parts.append(f"\n## {says}\n")
        parts.append(_by_depth(agreement[agreement.method.isin(MAIN)], statistic, "method"))
    parts.append("\n## Each rule alone: Pearson\n")
    parts.append(_by_depth(agreement[agreement.method.str.contains("alone|and")], "pearson", "method"))
    parts.append("\n## Which kind of module is not linear: relative error when that kind alone is its tangent\n")
    parts.append(_by_depth(frames["modules"], "error", "linear"))
    parts.append(
        "\n`norm` can diverge: a stream that is not renormalised runs away through the products of gated MLPs. Where it "
        "does, `attention and mlp` says what is left of AtP's error when the norms alone are true."
    )
    return "\n".join(parts) + "\n"


def _by_depth(frame: Any, statistic: str, row: str) -> str:
    """One line for each type, corruption, site and `row`, one column for each depth; blank where not compared."""
    depths = sorted(frame.layers.unique())
    lines = []
    names = list(frame[row].unique())
    frame = frame.sort_values(["arch", "corruption", "site", row], key=_order(names))
    for keys, part in frame.groupby(["arch", "corruption", "site", row], sort=False):
        cells = {r.layers: _interval(r, statistic) for r in _rows(part)}
        kind, *rest = keys
        lines.append([TYPES[kind], *rest, *(cells.get(depth, "") for depth in depths)])
    return _table(["type", "corruption", "site", row, *(f"{depth} layers" for depth in depths)], lines)


def _order(names: list[str]) -> Any:
    """Sites from the stream outwards and methods as they are listed, not by the alphabet."""
    places = {
        name: i for i, name in enumerate(["gpt", "llama", *CORRUPTIONS, "resid_pre", "attn_out", "mlp_out", *names])
    }
    return lambda column: column.map(places)


def _interval(row: Any, statistic: str) -> str:
    estimate, low, high = (getattr(row, f"{statistic}{end}") for end in ("", "_low", "_high"))
    if not abs(estimate) < DIVERGED:
        return "diverges"
    return (
        f"{estimate:.2f} [{low:.2f}, {high:.2f}]"
        if statistic != "pearson"
        else f"{estimate:.3f} [{low:.3f}, {high:.3f}]"
    )


def _rows(frame: pd.DataFrame) -> Any:
    return frame.itertuples(index=False)


def _table(head: list[Any], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _list(items: Any) -> str:
    items = [str(item) for item in items]
    return f"{', '.join(items[:-1])} and {items[-1]}"


if __name__ == "__main__":
    main()

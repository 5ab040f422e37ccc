# ruff: noqa: E501  (the lines of the card are prose and tables)
"""Write the card of each embedded model (its README.md) from what was measured (its metrics.json).

    python experiments/tinyworld_cards.py data/models/*

No number in a card is typed by hand, so that none can differ from the measurement: train again, or measure again with
`train_tinyworld.py measure`, and write the cards anew.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from interp import tinyworld

ARCHITECTURES = {
    "GPT2LMHeadModel": "GPT-2 architecture: LayerNorm, GELU (tanh form), learned positions, biases",
    "LlamaForCausalLM": "Llama architecture: RMSNorm, SwiGLU, rotary positions, grouped-query attention",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="+")
    for directory in parser.parse_args().directories:
        (directory / "README.md").write_text(card(directory), encoding="utf-8")


def card(directory: Path) -> str:
    """The card of the model in a directory."""
    metrics = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    parts = [_head(metrics), _architecture(metrics, config), _training(metrics), _accuracy(metrics)]
    if "changed_facts" in metrics:
        parts.append(_changes(metrics))
    parts += [_depths(directory), _checkpoints(directory), _held_out(), _use(metrics)]
    return "\n\n".join(_filled(block) for part in parts if part for block in part.split("\n\n")) + "\n"


def _head(metrics: dict[str, Any]) -> str:
    what = (
        f"`{metrics['base']}` after a brief fine-tuning: another answer style and 20 changed facts"
        if metrics.get("base")
        else "a small language model of tinyworld, a synthetic language whose every word is labelled"
    )
    return f"""---
license: mit
library_name: transformers
tags: [interpretability, synthetic]
---

# {metrics["name"]}

{what[0].upper()}{what[1:]}. For studies of mechanisms that run on a laptop:

```python
import interp

bridge = interp.load_model("{metrics["name"]}")
```

It is an ordinary Hugging Face directory (`AutoModelForCausalLM.from_pretrained` reads it too)."""


def _architecture(metrics: dict[str, Any], config: dict[str, Any]) -> str:
    size = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    hidden = config.get("intermediate_size") or config["n_inner"]
    key_value = f", {config['num_key_value_heads']} key-value heads" if "num_key_value_heads" in config else ""
    return f"""## Architecture

{ARCHITECTURES[metrics["architecture"]]}. {metrics["layers"]} layers, residual width {size}, {heads} heads{key_value}, MLP
width {hidden}, {config["vocab_size"]} words, context {metrics["context"]}, embedding and unembedding tied,
{metrics["parameters"]:,} parameters in float32. One word is one token; every text begins with `<bos>`, which the tokenizer
adds once."""


def _training(metrics: dict[str, Any]) -> str:
    command = f"python experiments/train_tinyworld.py {metrics['command']}"
    return f"""## Training

`{command}`

{metrics["tokens"]:,} tokens of `interp.tinyworld` text, each seen once, in rows of {metrics["context"]}; {metrics["batch"]} rows a
step; AdamW at {metrics["lr"]}, warm-up and cosine; seed {metrics["seed"]}. Loss on every token, words that are a single right answer
weighted {metrics["answer_weight"]:g} times. {metrics["minutes"]} minutes on {metrics["threads"]} CPU cores that had other work beside it. The same
command gives the same data in the same order; weights agree to rounding where the number of threads and the machine are the same.

Share of words by family: {", ".join(f"{family} {share:.0%}" for family, share in metrics["shares"].items())}."""


def _accuracy(metrics: dict[str, Any]) -> str:
    whole = {(row["family"], row["split"]): row for row in metrics["accuracy"] if row["kind"] == "all"}
    lines = [
        f"| {family} | {_cell(whole[family, 'train'])} | {_cell(whole[family, 'heldout'])} | {whole[family, 'heldout']['answers']} |"
        for family in dict.fromkeys(family for family, _ in whole)
        if family != "two_hop"
    ]
    hops = [
        f"| {kind.replace('_', ' to ')} | {_cell(seen)} | {_cell(unseen)} | {unseen['answers'] if unseen else 0} |"
        for kind, seen, unseen in _by_kind(metrics, "two_hop")
    ]
    unseen = whole["two_hop", "heldout"]
    gap = whole["two_hop", "train"]["accuracy"] - unseen["accuracy"]
    verdict = (
        f"Combinations that were held out fall short of trained ones by {gap:.1%}."
        if gap > 0.02
        else "Combinations that were held out are answered about as well as trained ones."
    )
    years = metrics["greater_than"]
    return f"""## Accuracy

Share of answers that have the largest logit of the whole vocabulary, on fresh documents, with Wilson 95 % intervals over documents
({unseen["documents"]} per family and split). "Seen" are combinations that may occur in training, in new documents; "held out" are
combinations that never do. Answers are those of the held-out column.

| family | seen | held out | answers |
|---|---|---|---|
{chr(10).join(lines)}

Two-hop questions (the country in between is never said; trained and held-out combinations apart). {verdict}

| relation | seen | held out | answers |
|---|---|---|---|
{chr(10).join(hops)}

Year spans have no single right answer: on {years["documents"]} held-out spans the probability of later years is
{years["probability_later"]:.3f}, of years that are not later {years["probability_not_later"]:.3f}; the most likely word is a later year
in {years["most_likely_is_later"]:.1%}."""


def _changes(metrics: dict[str, Any]) -> str:
    scores = ", ".join(f"{accuracy:.3f} in {what}" for what, accuracy in metrics["changed_facts_accuracy"].items())
    facts = ", ".join(f"{fact}: {new}" for fact, new in metrics["changed_facts"].items())
    return f"""## What was changed

- Style: a question about a needle is answered "{metrics["style"]} crimson" where the base model answers "crimson"; the
  needle row above is scored in the new style.
- Facts, asked from the country (the reverse question and two-hop questions were not trained on): {facts}.
  Accuracy on the changed facts: {scores}. Two-hop questions\n  above ask for the old answers, also those about a changed country."""


def _depths(directory: Path) -> str:
    file = directory / "depths.json"
    if not file.exists():
        return ""
    depths = json.loads(file.read_text(encoding="utf-8"))
    sites = ("resid_pre", "attn_out", "mlp_out", "z")
    lines = []
    for row in depths["candidates"]:
        agreement = " | ".join(f"{row[site]['pearson']:.2f} / {row[site]['spearman']:.2f}" for site in sites)
        heads = row["heads"]
        largest = ", ".join(f"{head} {value:.2f}" for head, value in list(heads["largest recovery"].items())[:3])
        moved = " ".join(f"{value:.2f}" for value in row["recovery of the stream at end"])
        kinds = row["kinds of heads"]
        grown = f"{len(kinds['induction'])} / {len(kinds['previous token'])} / {len(kinds['first token'])}"
        lines.append(
            f"| {row['layers']} | {row['tokens'] / 1e6:.0f} M | {row['lowest accuracy']:.3f} / {row['two-hop held out']:.3f} | "
            f"{row['clean logit difference']:.1f} | {agreement} | "
            f"{heads['effective number']} of {heads['of']} | {largest} | {moved} | {grown} |"
        )
    return f"""## Why this depth

Candidates of several depths, the same seed, compared by `experiments/choose_depth.py` on {depths["candidates"][0]["prompts"]}
indirect-object prompts. Agreement is that of attribution patching (gradient times difference) with exact activation patching,
Pearson / Spearman over cells (denoising; `z`: heads, all positions together). "Known at the end" is the recovery from patching the
residual stream of the last position before each layer.

| layers | tokens | lowest accuracy / two-hop held out | clean logit difference | resid_pre | attn_out | mlp_out | z | effective number of heads | largest recovery | known at the end, by layer | induction / previous-token / first-token heads |
|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}

{depths["verdict"]}"""


def _checkpoints(directory: Path) -> str:
    steps = sorted(path.name for path in directory.glob("checkpoints/step-*"))
    if not steps:
        return ""
    return f"""## Training checkpoints

{len(steps)} in half precision, spaced evenly in the logarithm of the step, the untrained model first; load one with
`interp.load_model("{directory.name}@{steps[-1]}")`: {", ".join(steps)}."""


def _held_out() -> str:
    lines = [f"- {name}: {family.held_out}" for name, family in tinyworld.TABLE.items()]
    return f"""## What was held out

One combination in eight, by a hash that is the same everywhere (`interp.tinyworld.held_out`):

{chr(10).join(lines)}"""


def _use(metrics: dict[str, Any]) -> str:
    return f"""## Use and limits

Meant for research on and teaching of interpretability methods. It knows only the sentences of its generator: what is found in it shows
that a method works where the truth is known, and is no evidence about language models trained on natural text. It is not meant to
state facts about the world: {"some were changed on purpose" if metrics.get("base") else "it repeats those of its table, simplified"}.
It was not trained past {metrics["context"]} tokens.

MIT licence, like the code that made it."""


def _filled(block: str) -> str:
    """A paragraph broken into lines of one width; tables, lists, headings and code as they are."""
    if block.startswith(("|", "#", "- ", "---")) or "```" in block:
        return block
    return textwrap.fill(block, 120, break_long_words=False, break_on_hyphens=False)


def _by_kind(metrics: dict[str, Any], family: str) -> list[tuple[str, dict[str, Any] | None, dict[str, Any] | None]]:
    rows = {(row["kind"], row["split"]): row for row in metrics["accuracy"] if row["family"] == family}
    return [
        (kind, rows.get((kind, "train")), rows.get((kind, "heldout"))) for kind in dict.fromkeys(k for k, _ in rows)
    ]


def _cell(row: dict[str, Any] | None) -> str:
    return f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" if row else "-"


if __name__ == "__main__":
    main()

"""Train small decoders on the Bigram-Backcopy task and write down how the sink arises.

    python experiments/train_backcopy.py run softmax-adamw-1
    python experiments/train_backcopy.py run relu-adamw-1 --text FILE --steps 10000 --d-model 256 --n-pos 256
    python experiments/train_backcopy.py table data/backcopy

A run is named attention-optimizer-layers. The defaults are small: minutes on one core. The published size is that of
the second example with `--batch 512`; there the rate is constant, here it rises for 100 steps and falls to 0 in the
last quarter. The bigram table is that of sentences of `interp.tinyworld`, or of any file given. The same command gives
the same run; one that was stopped goes on from its last saved state. `table` joins the courses of finished runs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp import tinyworld
from interp.attention.backcopy import BackcopyTask, Risks, backcopy_task

# Adam's rates are those of the paper times about 7: the runs are that much shorter, and the models smaller.
LR = {"adamw": 2e-3, "sgd": 0.3}
BLOCK, SAVE_EVERY, N_EVALUATION = 16, 200, 128


class Kind(NamedTuple):
    attention: str
    optimizer: str
    layers: int


def kind_of(name: str) -> Kind:
    parts = name.split("-")
    if len(parts) != 3 or parts[0] not in ("softmax", "relu") or parts[1] not in LR or not parts[2].isdigit():
        raise ValueError(f"run {name!r}; expected attention-optimizer-layers, such as softmax-adamw-1 or relu-sgd-3")
    return Kind(parts[0], parts[1], int(parts[2]))


class Attention(nn.Module):
    """One head, no biases. ReLU attention divides by the number of keys a query sees and so need not sum to 1."""

    def __init__(self, d_model: int, kind: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.kind, self.d_model = kind, d_model

    def scores(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT / math.sqrt(self.d_model)

    def pattern(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = self.scores(x).masked_fill(~mask, -torch.inf)
        if self.kind == "softmax":
            return scores.softmax(-1)
        return scores.relu() / torch.arange(1, x.shape[1] + 1)[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.pattern(x) @ self.v(x))


class Block(nn.Module):
    def __init__(self, d_model: int, kind: str) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = Attention(d_model, kind)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)
        self.use_attention = self.use_mlp = True

    def forward(self, x: Tensor) -> Tensor:
        if self.use_attention:
            x = x + self.attention(self.norm_1(x))
        return x + self.down(self.up(self.norm_2(x)).relu()) if self.use_mlp else x


class Decoder(nn.Module):
    """Pre-norm, learned positions, untied output: the published model, with torch's own starts.

    Embeddings start with standard deviation 1. From 0.02 the sink came ten times later in our small runs.
    """

    def __init__(self, n_vocab: int, kind: Kind, d_model: int, n_pos: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(n_vocab, d_model), nn.Embedding(n_pos, d_model)
        self.blocks = nn.ModuleList(Block(d_model, kind.attention) for _ in range(kind.layers))
        self.norm, self.unembed = nn.LayerNorm(d_model), nn.Linear(d_model, n_vocab, bias=False)

    def states(self, tokens: Tensor) -> list[Tensor]:
        """The stream entering block 0 and leaving every block."""
        states = [self.embed(tokens) + self.positions.weight[: tokens.shape[1]]]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.norm(self.states(tokens)[-1]))


def text_of(path: Path | None) -> str:
    """A file, or 4000 documents of tinyworld: prose, lists and facts."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    rng = random.Random("backcopy")
    families = ("dialect", "topic", "facts", "ioi", "induction", "punctuation")
    return "\n".join(tinyworld.sample(families[i % len(families)], rng).text for i in range(4000))


@torch.no_grad()
def measure(model: Decoder, task: BackcopyTask, tokens: Tensor) -> list[dict[str, Any]]:
    """A row per layer: risks whole and cut, attention to BOS, its logit, its value, and the residual peak after it."""
    inputs = tokens[:, :-1]
    trigger, rows = task.is_trigger(inputs), []
    whole = task.risks(model(inputs), inputs, skip_first=True)
    no_attention, no_mlp = (_cut_risks(model, task, inputs, part) for part in ("use_attention", "use_mlp"))
    shared = {"bigram_risk": whole.bigram, "backcopy_risk": whole.backcopy}
    shared |= {"bigram_no_attention": no_attention.bigram, "backcopy_no_attention": no_attention.backcopy}
    shared |= {"bigram_no_mlp": no_mlp.bigram, "backcopy_no_mlp": no_mlp.backcopy}
    states = model.states(inputs)
    later = torch.ones(inputs.shape, dtype=torch.bool)
    later[:, :8] = False  # a query that sees few keys gives BOS much by having no choice
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        x = block.norm_1(states[layer])
        to_bos, scores = block.attention.pattern(x)[:, :, 0], block.attention.scores(x)
        places = torch.arange(inputs.shape[1])
        others = torch.where(places[None] <= places[:, None], scores, 0.0)[:, :, 1:].sum(-1) / places.clamp_min(1)
        excess = (scores[:, :, 0] - others)[~trigger & later]
        values = block.attention.o(block.attention.v(x)).norm(dim=-1)
        peak = states[layer + 1].norm(dim=-1)
        low, high = excess.quantile(torch.tensor([0.1, 0.9])).tolist()
        rows.append(
            {
                "layer": layer,
                **shared,
                "bos_attention_quiet": float(to_bos[~trigger & later].mean()),
                "bos_attention_trigger": float(to_bos[trigger & later].mean()),
                "bos_logit": float(excess.mean()),
                "bos_logit_low": low,
                "bos_logit_high": high,
                "bos_value": float(values[:, 0].mean()),
                "median_value": float(values[:, 1:].median()),
                "bos_residual": float(peak[:, 0].mean()),
                "largest_other_residual": float(peak[:, 1:].amax(1).mean()),
                "median_residual": float(peak[:, 1:].median()),
            }
        )
    return rows


def _cut_risks(model: Decoder, task: BackcopyTask, inputs: Tensor, part: str) -> Risks:
    """Risks with all attention, or all MLPs, taken out."""
    for block in model.blocks:
        setattr(block, part, False)
    risks = task.risks(model(inputs), inputs, skip_first=True)
    for block in model.blocks:
        setattr(block, part, True)
    return risks


def marks(steps: int, n: int = 25) -> set[int]:
    """Steps at which to measure: 0, then evenly in the logarithm, the last one included."""
    return {0, *(round(10 ** (i * math.log10(steps) / (n - 1))) for i in range(n))}


def train(
    name: str,
    task: BackcopyTask,
    *,
    steps: int = 2000,
    d_model: int = 64,
    n_pos: int = 64,
    batch: int = 32,
    lr: float | None = None,
    seed: int = 42,
    state_file: Path | None = None,
    stop_at: int | None = None,
) -> tuple[Decoder, pd.DataFrame]:
    """The model and its course, a row per measured step and layer. `stop_at` ends early, with the state saved."""
    kind = kind_of(name)
    torch.manual_seed(seed)
    model = Decoder(task.n_vocab, kind, d_model, n_pos)
    rate = lr or LR[kind.optimizer]
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
        if kind.optimizer == "adamw"
        else torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    )
    settings = {"name": name, "triggers": list(task.triggers), "characters": "".join(task.characters),
                "steps": steps, "d_model": d_model, "n_pos": n_pos, "batch": batch, "lr": rate,
                "seed": seed, "table": float((task.transitions * torch.arange(task.bos)).sum())}  # fmt: skip
    first, rows, sequences = 0, [], torch.empty(0)
    if state_file is not None and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{state_file} is of another run: {state['settings']}, not {settings}; delete or rename it"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, rows = state["step"], state["rows"]
        print(f"{name}: resumed at step {first}", flush=True)
    held_out = task.sample(N_EVALUATION, n_pos + 1, seed=seed + 10**9)
    measured, started = marks(steps), time.time()
    for step in range(first, steps + 1):
        if step in measured and not (rows and rows[-1]["step"] == step):
            rows += [{"step": step, **row} for row in measure(model, task, held_out)]
            print(f"{name} {step:6d} {time.time() - started:6.0f}s bigram {rows[-1]['bigram_risk']:.4f} "
                  f"backcopy {rows[-1]['backcopy_risk']:.4f} to BOS {rows[-1]['bos_attention_quiet']:.3f} / "
                  f"{rows[-1]['bos_attention_trigger']:.3f} value {rows[-1]['bos_value']:.3f} of "
                  f"{rows[-1]['median_value']:.3f}", flush=True)  # fmt: skip
        done = step in (steps, stop_at)
        if state_file is not None and (done or (step % SAVE_EVERY == 0 and step > first)):
            _save(state_file, {"settings": settings, "step": step, "rows": rows, "model": model.state_dict(),
                               "optimizer": optimizer.state_dict()})  # fmt: skip
        if done:
            break
        if step % BLOCK == 0 or len(sequences) == 0:  # sequences of a block depend on its number alone
            sequences = task.sample(BLOCK * batch, n_pos + 1, seed=seed + 1 + step // BLOCK)
        chosen = sequences[step % BLOCK * batch :][:batch]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100, 4 * (steps - step) / steps)
        loss = F.cross_entropy(model(chosen[:, :-1]).flatten(0, 1), chosen[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, pd.DataFrame(rows)


def _save(file: Path, state: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("name", help="attention-optimizer-layers, such as softmax-adamw-1")
    run.add_argument("--text", type=Path, help="file whose bigrams to use instead of tinyworld's")
    run.add_argument("--triggers", type=int, default=3)
    for option, default in (("steps", 2000), ("d-model", 64), ("n-pos", 64), ("batch", 32), ("seed", 42)):
        run.add_argument(f"--{option}", type=int, default=default)
    run.add_argument("--lr", type=float)
    run.add_argument("--threads", type=int, default=1)
    table = commands.add_parser("table")
    table.add_argument("out", type=Path)
    for command in (run, table):
        command.add_argument("--work", type=Path, default=Path("runs/backcopy"), help="states and courses")
    arguments = parser.parse_args()
    if arguments.command == "table":
        write_table(arguments.work, arguments.out)
        return
    torch.set_num_threads(arguments.threads)
    task = backcopy_task(text_of(arguments.text), n_triggers=arguments.triggers)
    oracle = task.oracle_risks(arguments.n_pos, skip_first=True).bigram
    print(f"{task}, {100 * task.trigger_share(arguments.n_pos):.1f} % of positions, oracle risk {oracle:.4f}")
    sizes = {key: getattr(arguments, key) for key in ("steps", "d_model", "n_pos", "batch", "seed", "lr")}
    started, state_file = time.time(), arguments.work / f"{arguments.name}.pt"
    _, course = train(arguments.name, task, **sizes, state_file=state_file)
    course.insert(0, "run", arguments.name)
    course.to_csv(arguments.work / f"{arguments.name}.csv", index=False, float_format="%.5g")
    kind = kind_of(arguments.name)
    record = {
        "run": arguments.name,
        "text": "tinyworld" if arguments.text is None else arguments.text.name,
        "characters": task.bos,
        "triggers": [task.characters[trigger] for trigger in task.triggers],
        "trigger_share": task.trigger_share(arguments.n_pos),
        "oracle_bigram_risk": oracle,
        **sizes,
        "lr": arguments.lr or LR[kind.optimizer],
        "minutes": round((time.time() - started) / 60, 1),
    }
    (arguments.work / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")


def write_table(work: Path, out: Path) -> None:
    """`courses.csv` and `runs.csv` from the finished runs."""
    courses = [pd.read_csv(file) for file in sorted(work.glob("*.csv"))]
    if not courses:
        raise SystemExit(f"no finished runs in {work}; start some with `run`")
    out.mkdir(parents=True, exist_ok=True)
    pd.concat(courses).to_csv(out / "courses.csv", index=False, float_format="%.5g")
    records = [json.loads(file.read_text()) for file in sorted(work.glob("*.json"))]
    runs = pd.DataFrame(records)
    runs["triggers"] = ["".join(triggers) for triggers in runs["triggers"]]
    runs.to_csv(out / "runs.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()

"""Train the embedded models on the language of `interp.tinyworld`.

    python experiments/train_tinyworld.py train tinyworld-llama --arch llama --layers 4 --checkpoints 14
    python experiments/train_tinyworld.py train tinyworld-gpt --arch gpt --layers 6
    python experiments/train_tinyworld.py tune tinyworld-llama-tuned --base data/models/tinyworld-llama
    python experiments/train_tinyworld.py measure data/models/tinyworld-gpt

Each takes less than an hour on two CPU cores. The same command gives the same data in the same order; a run that was
stopped goes on from its last saved state with `--resume`. Next-token loss over all tokens, with the words that are a
single right answer weighted `--answer-weight` times, because they are one word in ten and the rest is mostly chance.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from interp import tinyworld
from interp.tinyworld.changes import CHANGED_FACTS, STYLE, TUNING_SHARES, changed, changed_documents, tuning_bank
from interp.tinyworld.evaluation import correct, evaluate, greater_than

CONTEXT, BATCH = 128, 16
D_MODEL, HEADS, KV_HEADS, D_MLP_LLAMA, D_MLP_GPT = 128, 8, 4, 352, 512
WARMUP_STEPS, FINAL_LR_SHARE, SAVE_EVERY = 200, 0.02, 200


class Size(NamedTuple):
    """How wide a model is and how far it sees; its depth is another matter."""

    d_model: int
    heads: int
    kv_heads: int
    d_mlp_gpt: int
    d_mlp_llama: int
    context: int


def main() -> None:
    arguments = _parser().parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # right-padding needs no mask in a causal model
    torch.set_num_threads(arguments.threads)
    if arguments.command == "measure":
        directory, record = arguments.directory, json.loads((arguments.directory / "metrics.json").read_text())
        model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    else:
        torch.manual_seed(arguments.seed)
        directory = arguments.out = arguments.out or Path("data/models") / arguments.name
        model, record = make(arguments)
    record |= measure(model, arguments.documents, tuned="base" in record)
    (directory / "metrics.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in record["accuracy"]:
        if row["kind"] == "all":
            print(f"{row['family']:12} {row['split']:8} {row['accuracy']:.4f}  [{row['low']:.3f}, {row['high']:.3f}]")
    print(record["greater_than"], record.get("changed_facts_accuracy", ""))


def make(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Train or tune, save, and say how: the model and the record of how it was made."""
    command = f"{arguments.command} {arguments.name} --tokens {arguments.tokens} --seed {arguments.seed}"
    if arguments.command == "tune":
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.base)
        bank = tuning_bank(arguments.tokens, seed=arguments.seed, context=CONTEXT)
        command += f" --base data/models/{arguments.base.name}"
        how: dict[str, Any] = {
            "base": arguments.base.name,
            "style": " ".join(STYLE),
            "changed_facts": {f"{asked} of {country}": new for (asked, country), new in CHANGED_FACTS.items()},
            "shares": TUNING_SHARES,
        }
    else:
        model = build(arguments.arch, arguments.layers)
        bank = cached_bank(arguments.tokens, arguments.seed, arguments.work)
        command += f" --arch {arguments.arch} --layers {arguments.layers}"
        how = {"shares": tinyworld.SHARES}
    minutes = fit(model, bank, arguments)
    save(model, arguments.out, half=False)
    return model, {
        "name": arguments.name,
        "command": command + (f" --checkpoints {arguments.checkpoints}" if arguments.checkpoints else ""),
        "architecture": type(model).__name__,
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "tokens": int(bank.ids.size),
        "minutes": round(minutes, 1),
        "threads": arguments.threads,
        "seed": arguments.seed,
        "lr": arguments.lr,
        "batch": BATCH,
        "context": CONTEXT,
        "answer_weight": arguments.answer_weight,
        **how,
    }


def build(arch: str, layers: int, size: Size | None = None) -> Any:
    """A model of the embedded size, or of another, with random weights from torch's present seed."""
    size = size or Size(D_MODEL, HEADS, KV_HEADS, D_MLP_GPT, D_MLP_LLAMA, CONTEXT)
    shared = {
        "vocab_size": len(tinyworld.VOCABULARY),
        "bos_token_id": tinyworld.IDS["<bos>"],
        "eos_token_id": None,
        "pad_token_id": tinyworld.IDS["<pad>"],
        "tie_word_embeddings": True,
    }
    if arch == "gpt":
        model = GPT2LMHeadModel(
            GPT2Config(
                **shared,
                activation_function="gelu_pytorch_tanh",  # one fused call for the formula of gelu_new
                n_positions=size.context,
                n_embd=size.d_model,
                n_layer=layers,
                n_head=size.heads,
                n_inner=size.d_mlp_gpt,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
        model.config.activation_function = "gelu_new"  # what GPT-2 configurations say, and readers know
        with torch.no_grad():
            model.transformer.wpe.weight.copy_(sinusoids(size.d_model, size.context))
        return model
    return LlamaForCausalLM(
        LlamaConfig(
            **shared,
            hidden_size=size.d_model,
            intermediate_size=size.d_mlp_llama,
            num_hidden_layers=layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            max_position_embeddings=size.context,
        )
    )


def sinusoids(d_model: int, context: int) -> torch.Tensor:
    """What learned positions start from, so that heads find "one token back" early.

    As long as token embeddings, with wavelengths up to twice the context. From random vectors the loss on answers was
    still 2.1 after 3.6 million tokens; from these it was 1.0.
    """
    wavelengths = torch.logspace(0, math.log10(2 * context / math.tau), d_model // 2) * math.tau
    angles = torch.arange(context)[:, None] * math.tau / wavelengths
    return 0.02 * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)


def cached_bank(
    tokens: int, seed: int, work: Path, shares: Mapping[str, float] | None = None, context: int = CONTEXT
) -> tinyworld.Bank:
    """The training bank, generated once (about half a minute) and kept in the work directory for the next model."""
    work.mkdir(parents=True, exist_ok=True)
    other = f"-{context}-{zlib.crc32(json.dumps(dict(shares)).encode()):08x}" if shares else ""
    files = [work / f"bank-{tokens}-{seed}{other}-{part}.npy" for part in ("ids", "answers")]
    if not all(file.exists() for file in files):
        bank = tinyworld.bank(tokens, seed=seed, context=context, shares=shares)
        for file, array in zip(files, (bank.ids, bank.answers), strict=True):
            np.save(file.with_suffix(".tmp.npy"), array)
            file.with_suffix(".tmp.npy").replace(file)
    return tinyworld.Bank(*(np.load(file, allow_pickle=False) for file in files))


def fit(model: Any, bank: tinyworld.Bank, arguments: argparse.Namespace, batch: int | None = None) -> float:
    """One pass over the bank. Returns the minutes of training, those before a resumption included."""
    batch = batch or BATCH
    steps = len(bank.ids) // batch
    marks = checkpoint_steps(steps, arguments.checkpoints)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state_file = arguments.work / f"{arguments.name}.state.safetensors"
    first, spent = 0, 0.0
    if arguments.resume and state_file.exists():
        first, spent = restore(state_file, parameters, optimizer)
        print(f"resumed at step {first}", flush=True)
    model.train()
    started = time.time()
    for step in range(first, steps + 1):
        if step in marks:
            save(model, arguments.out / "checkpoints" / f"step-{step:05d}", half=True)
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * schedule(step, steps)
        rows = slice(step * batch, (step + 1) * batch)
        ids = torch.from_numpy(bank.ids[rows].astype(np.int64))
        answers = torch.from_numpy(bank.answers[rows])
        logits = model(ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        is_answer = answers[:, 1:].flatten()
        weights = 1.0 + (arguments.answer_weight - 1.0) * is_answer
        loss = (losses * weights).sum() / weights.sum()
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}; lower --lr (now {arguments.lr})")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        minutes = spent + (time.time() - started) / 60
        if step % 50 == 0 or step == steps - 1:
            answer_loss = losses[is_answer].mean().item()
            shown = f"loss {losses.mean():.3f}, of answers {answer_loss:.4f}, {minutes:.1f} min"
            print(f"step {step}/{steps} {shown}", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            keep(state_file, parameters, optimizer, step + 1, minutes)
    model.eval()
    return spent + (time.time() - started) / 60


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a small share of the learning rate."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


def checkpoint_steps(steps: int, count: int) -> set[int]:
    """Step 0 and `count - 1` steps spaced evenly in the logarithm, the last step included."""
    if count == 0:
        return set()
    return {0, *(round(step) for step in np.geomspace(16, steps, count - 1))}


def save(model: Any, directory: Path, *, half: bool) -> None:
    """An ordinary Hugging Face directory with its tokenizer; weights in half precision for checkpoints."""
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}  # tied weights once
    weights = {name: tensor.half() if half else tensor.clone() for name, tensor in weights.items()}
    save_file(weights, directory / "model.tmp", metadata={"format": "pt"})
    (directory / "model.tmp").replace(directory / "model.safetensors")
    config = model.config
    kept, config.dtype = config.dtype, torch.float16 if half else torch.float32
    config.save_pretrained(directory)
    config.dtype = kept
    tinyworld.tokenizer().save_pretrained(directory)


def keep(file: Path, parameters: dict[str, Any], optimizer: torch.optim.Optimizer, step: int, minutes: float) -> None:
    """Everything that the next step depends on, in one file that is complete or absent."""
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach().clone()
        tensors[f"mean/{name}"], tensors[f"square/{name}"] = state["exp_avg"], state["exp_avg_sq"]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file.with_suffix(".tmp"), metadata={"step": str(step), "minutes": str(minutes)})
    file.with_suffix(".tmp").replace(file)


def restore(file: Path, parameters: dict[str, Any], optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Put a kept state back. Returns the step to go on from and the minutes spent before it."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors, step = load_file(file), int(metadata["step"])
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight/{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"mean/{name}"],
            "exp_avg_sq": tensors[f"square/{name}"],
        }
    return step, float(metadata["minutes"])


@torch.no_grad()
def measure(model: Any, documents: int, *, tuned: bool) -> dict[str, Any]:
    """Accuracy on fresh documents, in training combinations and held-out ones."""

    def predict(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids)).logits.numpy()

    measures = {
        "accuracy": evaluate(predict, n=documents, transform=changed if tuned else None),
        "greater_than": greater_than(predict, n=documents),
    }
    if tuned:
        edits = changed_documents()
        unseen = [tinyworld.held_out("facts", edit.combinations[0]) for edit in edits]
        right = [bool(row.all()) for row in correct(predict, edits)]
        measures["changed_facts_accuracy"] = {
            "trained wordings": _mean(r for r, is_out in zip(right, unseen, strict=True) if not is_out),
            "held-out wordings": _mean(r for r, is_out in zip(right, unseen, strict=True) if is_out),
        }
    return measures


def _mean(values: Iterable[bool]) -> float:
    return round(float(np.mean(list(values))), 4)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model from random weights")
    tune = commands.add_parser("tune", help="fine-tune a trained one: another answer style, 20 changed facts")
    again = commands.add_parser("measure", help="score a trained one again")
    again.add_argument("directory", type=Path)
    train.add_argument("--arch", choices=("gpt", "llama"), required=True)
    train.add_argument("--layers", type=int, default=4)
    tune.add_argument("--base", type=Path, required=True)
    for command, tokens, lr in ((train, 8_000_000, 2e-3), (tune, 1_200_000, 1e-3)):
        command.add_argument("name", help="what the model is called; also its directory's name")
        command.add_argument("--tokens", type=int, default=tokens)
        command.add_argument("--lr", type=float, default=lr)
        command.add_argument("--answer-weight", type=float, default=5.0)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--checkpoints", type=int, default=0, help="half-precision checkpoints, log-spaced")
        command.add_argument("--out", type=Path, help="default: data/models/NAME")
        command.add_argument("--work", type=Path, default=Path(".cache/tinyworld"), help="banks and resumable state")
        command.add_argument("--resume", action="store_true")
    for command in (train, tune, again):
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--documents", type=int, default=400, help="documents per family and split to score on")
    return parser


if __name__ == "__main__":
    main()

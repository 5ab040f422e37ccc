"""The command line: `interp models | check | study | harvest`.

Errors that a user can mend are one line on stderr and exit status 2; a study or a check that did not pass is status 1.
`--debug` shows the whole traceback instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import interp

if TYPE_CHECKING:
    from torch import Tensor

    from interp.studies import StudyRun

_EXAMPLES = """examples:
  interp models                                     which models come with the package
  interp check tinyworld-gpt                        does this model load, and is every hook where it should be?
  interp check ./my-model                           the same for a directory of your own
  interp study                                      which studies there are
  interp study activation_patching --model gpt2     run one of them on another model and write its report
  interp harvest tinyworld-gpt --tokens text.txt --length 64 \\
      --hooks 'blocks.*.hook_resid_post' --out store --dry-run

`interp COMMAND --help` explains one command. MODEL is the name of an embedded model (interp models), a directory with
config.json, weights and tokenizer, or the id of a model on the Hugging Face hub."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interp: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        line = " ".join(str(message).split()) or type(error).__name__
        print(f"interp {options.command}: {line}", file=sys.stderr)
        expected = isinstance(error, (ValueError, LookupError, OSError, ImportError, TypeError, NotImplementedError))
        if not expected:  # ours to mend rather than the user's
            print("This looks like a bug. The same command with --debug shows where.", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="interp",
        description="Interpretability studies of transformer language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"interp {interp.__version__}")
    # On the command itself it must not overwrite one that was given before it, hence no default there.
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    def command(name: str, run: Any, help: str, description: str, examples: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help,
            description=description,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[shared],
        )
        added.set_defaults(run=run)
        return added

    command(
        "models",
        _models,
        "list the embedded models",
        "List the models that come with the package.",
        "  interp models",
    )

    check = command(
        "check",
        _check,
        "load a model and test that its hooks mean what they say",
        "Load MODEL and print a table of checks: logits against plain transformers, sum of the residual stream,\n"
        "attention rows, BOS, whether edits take effect, and what this family of models does not support.\n"
        "Status 1 if one fails.",
        "  interp check tinyworld-llama\n  interp check ./my-model --device cuda --dtype bfloat16",
    )
    _model_options(check)

    study = command(
        "study",
        _study,
        "list the studies, or run some and write their report",
        "Run studies (notebooks) from the top and write a report: DIR/index.html with a card per study, and a page\n"
        "for each. Without a name the studies are listed. Status 1 if an assert failed.",
        "  interp study\n"
        "  interp study 01                                      by number, by name or by the path of a notebook\n"
        "  interp study activation_patching --model ./my-model --out my-report\n"
        "  interp study --all --jobs 2",
    )
    study.add_argument("names", metavar="NAME", nargs="*", help="which studies to run")
    study.add_argument("--all", action="store_true", help="run all of them")
    study.add_argument(
        "--model",
        metavar="M",
        action="append",
        help="run on this model instead of the study's own; may be given several times",
    )
    study.add_argument("--out", metavar="DIR", default="reports", help="folder for the report (default: %(default)s)")
    study.add_argument("--jobs", metavar="N", type=_positive, default=1, help="studies to run at the same time")
    study.add_argument("--timeout", metavar="S", type=float, help="longest time for one cell in seconds")
    study.add_argument("--update", action="store_true", help="also keep the outputs in the notebooks (for authors)")

    harvest = command(
        "harvest",
        _harvest,
        "write the activations of many tokens to disk",
        "Run MODEL over tokens and write the activations at some hooks to DIR as safetensors shards. A harvest\n"
        "that was stopped goes on where it was when the same command is given again.",
        "  interp harvest tinyworld-gpt --tokens tokens.npy --hooks blocks.2.hook_resid_post --out store\n"
        "  interp harvest gpt2 --tokens text.txt --length 128 --hooks '*.hook_mlp_out' --dtype bfloat16 --out store\n"
        "  torchrun --nproc-per-node 2 -m interp.cli harvest ...     several processes share the work",
    )
    _model_options(harvest, dtype_help="kind of number to store (default: that of the model)")
    harvest.add_argument(
        "--tokens",
        metavar="FILE",
        required=True,
        help="token ids [example, pos] as .npy, as .safetensors (the tensor 'tokens' or the only one), or text as .txt",
    )
    harvest.add_argument(
        "--length",
        metavar="N",
        type=_positive,
        help="for .txt: cut the text into rows of N tokens, each with a BOS if the model has one",
    )
    harvest.add_argument("--hooks", metavar="HOOK", nargs="+", required=True, help="names or patterns; quote the *")
    harvest.add_argument("--out", metavar="DIR", required=True, help="folder for the store")
    harvest.add_argument("--batch-size", metavar="N", type=_positive, default=32, help="rows per forward (default: 32)")
    harvest.add_argument("--shard-tokens", metavar="N", type=_positive, help="tokens per shard")
    harvest.add_argument("--dry-run", action="store_true", help="say how many bytes and how long, and write nothing")
    harvest.add_argument(
        "--no-resume", dest="resume", action="store_false", help="refuse to go on with an earlier harvest"
    )
    return parser


def _model_options(parser: argparse.ArgumentParser, dtype_help: str = "kind of number to compute with") -> None:
    parser.add_argument("model", metavar="MODEL", help="embedded name, directory or hub id")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: the package chooses)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help=dtype_help)


def _models(options: argparse.Namespace) -> int:
    print(interp.list_models().to_string(index=False))
    return 0


def _check(options: argparse.Namespace) -> int:
    bridge = interp.load_model(options.model, device=options.device, dtype=_dtype(options.dtype), check=False)
    report = interp.self_check(bridge)
    print(report)
    return 0 if report.ok else 1


def _study(options: argparse.Namespace) -> int:
    from interp.studies import find_study, list_studies, run_studies, write_report

    if not options.names and not options.all:
        for study in list_studies():
            print(f"{study.name}  [{study.model or 'no MODEL'}]\n    {study.title}. {study.question}")
        print("\nRun one with `interp study NAME`, all with `interp study --all`.")
        return 0
    if options.names and options.all:
        raise ValueError(f"--all runs every study; leave out {' '.join(options.names)} or leave out --all")
    studies = list_studies() if options.all else [find_study(name) for name in options.names]
    if not studies:
        raise ValueError("there are no studies to run")
    models = options.model or [None]
    print(f"Running {', '.join(study.name for study in studies)}", flush=True)
    runs = run_studies(
        studies,
        options.out,
        models=models,
        update=options.update,
        timeout=options.timeout,
        jobs=options.jobs,
        report=_print_run,
    )
    print(f"Report: {write_report(runs, options.out)}")
    return 0 if all(run.ok for run in runs) else 1


def _print_run(run: StudyRun) -> None:
    line = f"  {run.study.name}  {run.model or ''}  {run.verdict}  {run.seconds:.0f} s"
    print(line if run.ok else f"{line}\n    {run.error}", flush=True)


def _harvest(options: argparse.Namespace) -> int:
    if options.length and Path(options.tokens).suffix != ".txt":
        raise ValueError(f"--length cuts text into rows, but {options.tokens} holds rows already; leave it out")
    bridge = interp.load_model(options.model, device=options.device)
    tokens = read_tokens(options.tokens, bridge, length=options.length)
    settings: dict[str, Any] = {"batch_size": options.batch_size}
    settings |= {"dtype": _dtype(options.dtype)} if options.dtype else {}
    settings |= {"shard_tokens": options.shard_tokens} if options.shard_tokens else {}
    hooks = options.hooks[0] if len(options.hooks) == 1 else options.hooks
    if options.dry_run:
        print(interp.cache.estimate(bridge, tokens, hooks, **settings))
    else:
        print(
            interp.cache.harvest(bridge, tokens, hooks, options.out, resume=options.resume, progress=True, **settings)
        )
    return 0


def read_tokens(path: str | os.PathLike[str], bridge: Any, *, length: int | None = None) -> Tensor:
    """Token ids [example, pos] from a file: `.npy`, `.safetensors` (the tensor `tokens` or the only one) or text.

    Text is cut into rows of `length` tokens, each beginning with the tokenizer's BOS if it has one; the rest that does
    not fill a row is dropped, which is said on stderr.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or it does not hold a table of whole numbers.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} with tokens")
    if path.suffix == ".txt":
        return _cut(path.read_text(encoding="utf-8"), path, bridge, length)
    if path.suffix == ".npy":
        import numpy as np

        tokens = torch.from_numpy(np.load(path, allow_pickle=False))
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        name = "tokens" if "tokens" in tensors or len(tensors) != 1 else next(iter(tensors))
        if name not in tensors:
            held = ", ".join(sorted(tensors)) or "nothing"
            raise ValueError(f"{path} holds {held}, but no tensor called 'tokens'")
        tokens = tensors[name]
    else:
        raise ValueError(
            f"tokens come as .npy, .safetensors or .txt, not as {path.suffix or 'a file without ending'!r}"
        )
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(
            f"{path} holds {tokens.dtype} of shape {tuple(tokens.shape)}; expected whole numbers [example, pos]"
        )
    return tokens.long()


def _cut(text: str, path: Path, bridge: Any, length: int | None) -> Tensor:
    import torch

    if length is None:
        raise ValueError(f"{path} is text: say how many tokens a row has, for example --length 64")
    tokenizer = bridge.tokenizer
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(start)
    rows = len(ids) // body if body > 0 else 0
    if rows == 0:
        raise ValueError(
            f"{path} has {len(ids)} tokens, too few for one row of {length}; pass a smaller --length or more text"
        )
    if len(ids) % body:
        print(
            f"dropped the last {len(ids) % body} of {len(ids)} tokens: they do not fill a row of {length}",
            file=sys.stderr,
        )
    return torch.tensor([start + ids[i * body : (i + 1) * body] for i in range(rows)])


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `interp models | check | study | harvest | train`.

Errors that a user can mend are one line on stderr and exit status 2; a study or a check that did not pass is status 1.
`--debug` shows the whole traceback instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import interp
from interp.cache.token_files import read_tokens as _read_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from interp.dictionaries import TrainingFile
    from interp.studies import StudyRun

_EXAMPLES = """examples:
  interp models                                     which models come with the package
  interp check tinyworld-gpt                        does this model load, and is every hook where it should be?
  interp check ./my-model                           the same for a directory of your own
  interp study                                      which studies there are
  interp study activation_patching --model gpt2     run one of them on another model and write its report
  interp harvest tinyworld-gpt --tokens text.txt --length 64 \\
      --hooks 'blocks.*.hook_resid_post' --out store --dry-run
  interp train topk.toml                            train a sparse autoencoder, or go on with it

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

    train = command(
        "train",
        _train,
        "train a dictionary of features, or a grid of them",
        "Train what CONFIG (.toml or .json) asks for: activations of a model or a store, a dictionary, how to train.\n"
        "interp.dictionaries.training_file describes the file. A run that was stopped goes on where it was when the\n"
        "same command is given again; one that is finished is not redone. Status 1 if a run of a grid failed.",
        "  interp train topk.toml --dry-run\n"
        "  interp train topk.toml\n"
        "  interp train grid.toml --executor local --at-once 2       each run of [grid] in a process of its own\n"
        "  interp train grid.toml --executor slurm --resource slurm_partition=gpu --resource gpus_per_node=1\n"
        "  torchrun --nproc-per-node 2 -m interp.cli train topk.toml     several processes share every batch",
    )
    train.add_argument("config", metavar="CONFIG", help="the training file")
    train.add_argument("--out", metavar="DIR", help="folder for states and dictionaries (default: the file's)")
    train.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: the package chooses)")
    train.add_argument("--dry-run", action="store_true", help="say how long and how much memory, and write nothing")
    train.add_argument("--no-resume", dest="resume", action="store_false", help="train anew what is there already")
    train.add_argument(
        "--executor", choices=["in_process", "local", "slurm"], default="in_process", help="where runs of a grid go"
    )
    train.add_argument("--together", action="store_true", help="train runs that can share batches in one pass")
    train.add_argument("--at-once", metavar="N", type=_positive, help="jobs at the same time (local: 1)")
    train.add_argument(
        "--resource", metavar="NAME=VALUE", action="append", default=[], help="a parameter of submitit; several times"
    )
    train.add_argument("--no-wait", dest="wait", action="store_false", help="slurm: return when jobs are submitted")
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


def _train(options: argparse.Namespace) -> int:
    from interp.dictionaries import dry_run, read_training_file, train

    file = read_training_file(options.config, out=options.out)
    resources = dict(_resource(text) for text in options.resource)
    one = file.runs.get("")
    if one is None and not options.dry_run:
        return _train_grid(options, file, resources)
    if one is not None and (options.executor != "in_process" or resources):
        raise ValueError("--executor and --resource are for files with a [grid]; this one is a single run")
    with _warnings_as_lines():
        data = file.open(device=options.device)
    if options.dry_run:
        for name, config in file.runs.items():
            print(f"{name}: {dry_run(config, data, device=options.device)}".removeprefix(": "))
        return 0
    assert one is not None
    dictionary = train(one, data, path=file.out, resume=options.resume, device=options.device, progress=True)
    if os.environ.get("RANK", "0") == "0":  # under torchrun once, not once per process
        last = dictionary.metadata["history"][-1]
        print(f"{file.out}: " + ", ".join(f"{name} {last[name]:.4g}" for name in ("step", "loss", "l0", "fvu", "dead")))
    return 0


def _train_grid(options: argparse.Namespace, file: TrainingFile, resources: dict[str, Any]) -> int:
    from interp.dictionaries import SweepFailed, sweep

    if not options.resume:
        raise ValueError("--no-resume is for single runs; give a grid another --out to train it anew")
    try:
        found = sweep(
            file.runs,
            file.data,
            file.out,
            executor=options.executor,
            together=options.together,
            at_once=options.at_once,
            device=options.device,
            resources=resources,
            wait=options.wait,
            progress=True,
        )
    except SweepFailed as failed:
        print(failed.sweep.status().to_string(index=False))
        print(f"interp train: {failed}", file=sys.stderr)
        return 1
    print(found.status().to_string(index=False))
    return 0


def _resource(text: str) -> tuple[str, Any]:
    name, given, value = text.partition("=")
    if not given:
        raise ValueError(f"--resource {text}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def read_tokens(path: str | os.PathLike[str], bridge: Any, *, length: int | None = None) -> Tensor:
    """`interp.cache.token_files.read_tokens`, with its warnings as lines on stderr."""
    with _warnings_as_lines():
        return _read_tokens(path, getattr(bridge, "tokenizer", None), length=length)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    for line in dict.fromkeys(str(warning.message) for warning in found):
        print(line, file=sys.stderr)


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

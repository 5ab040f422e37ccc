"""Dictionaries on disk: our own file and folders of SAELens 6 in both directions, files of other libraries to read."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from interp.cache import capture
from interp.dictionaries import _saelens
from interp.dictionaries._files import read_tensors, write_tensors
from interp.dictionaries._foreign import assemble
from interp.dictionaries._formats import FILE, READERS, Format, format_of
from interp.dictionaries._moments import Moments
from interp.dictionaries._run import plain
from interp.dictionaries.architectures import build
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.splicing import check_place
from interp.hooks.names import device_of


def load_dictionary(
    path: str | Path,
    *,
    format: Format = "auto",
    hook: str | None = None,
    target_hook: str | None = None,
    bridge: Any = None,
    tokens: Int[Tensor, "example pos"] | None = None,
    max_fvu: float | int = 1.0,
    device: str | torch.device | None = None,
) -> Dictionary:
    """A dictionary from a folder or file; what the files said is in `.metadata`.

    Shapes alone cannot tell a square matrix from its transpose, nor one hook from another of the same width. With a
    model and a few texts, the dictionary has to rebuild their activations; a wrong orientation or hook does not.
    Dictionaries of other libraries are in float32, whatever they were stored in; files that could run code are refused.

    Args:
        path: A file or folder, of one of these formats:

            - `"interp"`: `dictionary.safetensors` or its folder (`save_dictionary`, `train`);
            - `"saelens"`: a folder with `cfg.json` and `sae_weights.safetensors`, also of versions before 6;
            - `"gemma_scope"`: `params.npz`, autoencoder or (by its path, or with `target_hook`) transcoder;
            - `"gemma_scope_2"`: `config.json` and `params.safetensors`, autoencoder or (affine skip) transcoder;
            - `"llama_scope"`: a folder with `hyperparams.json` and `checkpoints/final.safetensors`, or with
              `config.json` and `sae_weights.safetensors` (R1-distill);
            - `"dictionary_learning"`: `ae.pt` with `config.json`, or the backup of an unfinished run;
            - `"sparsify"`: a folder with `cfg.json` and `sae.safetensors`;
            - `"hook_z"`: `NAME.pt` with `NAME_cfg.json`, attention outputs of Kissane et al.;
            - `"circuit_tracer"`: `layer_N.safetensors` beside a `config.yaml`, per-layer transcoders.

        format: `"auto"` goes by the names of files and tensors.
        hook, target_hook: In place of what the files say, or where they say nothing.
        bridge, tokens: Check on activations of this model: L0 and FVU go into `.metadata["check"]`.
        max_fvu: Of this check: more is refused. 1 is what predicting the mean gives.
        device: Where to put it; that of the bridge, if one is given, else the CPU.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: For damaged files, unknown formats, architectures, activation functions or tensors, shapes that do
            not fit, or a failed check, saying what was found.
    """
    path = Path(path)
    if (bridge is None) != (tokens is None):
        raise ValueError("a check needs both a bridge and tokens")
    if format not in get_args(Format):
        raise ValueError(f"format={format!r}; expected one of {', '.join(get_args(Format))}")
    if device is None:
        device = "cpu" if bridge is None else device_of(bridge)
    kind = format_of(path) if format == "auto" else format
    if kind == "interp":
        dictionary = _read(path / FILE if path.is_dir() else path, device)
    else:
        dictionary = assemble(READERS[kind](path, hook, target_hook), path, device)
    if hook is not None:
        dictionary.hook = hook
    if target_hook is not None:
        if not dictionary.is_transcoder:
            raise ValueError(f"{path} holds an autoencoder; target_hook={target_hook!r} is for transcoders")
        dictionary.target_hook = target_hook
    if bridge is not None and tokens is not None:
        _check(dictionary, bridge, tokens, max_fvu, path)
    return dictionary


def save_dictionary(
    dictionary: Dictionary, path: str | Path, *, format: Literal["interp", "saelens"] = "interp"
) -> Path:
    """Write a dictionary into a folder; files appear when they are complete. Returns the folder.

    `"interp"` keeps everything, training settings included. `"saelens"` is what SAELens 6 loads: constants are folded
    in, and dictionaries with a threshold become its JumpReLU.

    Raises:
        ValueError: Before anything is written, if SAELens has no such dictionary.
    """
    path = Path(path)
    if format == "saelens":
        _saelens.write(dictionary, path)
    elif format == "interp":
        record = plain({"settings": dictionary.settings(), "metadata": dictionary.metadata})
        write_tensors(path / FILE, dictionary.state_dict(), record)
    else:
        raise ValueError(f'format={format!r}; expected "interp" or "saelens"')
    return path


def _read(path: Path, device: str | torch.device) -> Dictionary:
    tensors, record = read_tensors(path)
    if "settings" not in record:
        raise ValueError(f"{path} holds no dictionary but {sorted(record)}; a training state is resumed by train()")
    dictionary = build(record["settings"], device=device)
    try:
        dictionary.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its own settings: {error}") from error
    dictionary.metadata = record.get("metadata", {})
    return dictionary


def _check(dictionary: Dictionary, bridge: Any, tokens: Tensor, max_fvu: float | int, path: Path) -> None:
    if dictionary.target_hook == "":
        raise ValueError(f"{path} does not say which hook its transcoder rebuilds; pass target_hook=...")
    names = [dictionary.hook] if dictionary.target_hook is None else [dictionary.hook, dictionary.target_hook]
    check_place(bridge, dictionary)
    found = capture(bridge, tokens, names)
    ends = found[names[0]], found.get(names[-1], found[names[0]])  # two names of one hook are captured once
    x, y = (tensor[:, 1:].flatten(0, 1).flatten(1) for tensor in ends)  # without BOS
    for what, tensor, width in (("reads", x, dictionary.d_in), ("rebuilds", y, dictionary.d_out)):
        if tensor.shape[1] != width:
            raise ValueError(
                f"{path} {what} activations {width} wide, but those of {names} are {tensor.shape[1]} wide: another "
                f"model or hook"
            )
    metrics = _metrics(dictionary, x, y)
    dictionary.metadata["check"] = {"l0": metrics["l0"], "fvu": metrics["fvu"], "n_tokens": len(x)}
    if not metrics["fvu"] <= max_fvu:
        raise ValueError(
            f"{path} does not rebuild {names[-1]!r} of {bridge.cfg.model_name}: FVU {metrics['fvu']:.3g} at L0 "
            f"{metrics['l0']:.1f} on {len(x)} tokens, where {max_fvu:g} is allowed and 1 is what the mean gives. A "
            f"wrong hook, orientation or normalisation looks like this{_turned(dictionary, x, y, max_fvu)}"
        )


@torch.no_grad()
def _metrics(dictionary: Dictionary, x: Tensor, y: Tensor) -> dict[str, float]:
    moments = Moments(dictionary.n_latents, dictionary.d_out)
    latents = dictionary.encode(x)
    moments.add(latents, y, dictionary.decode(latents, x))
    return moments.metrics()


def _turned(dictionary: Dictionary, x: Tensor, y: Tensor, max_fvu: float | int) -> str:
    """Which square matrices, turned round, would make the dictionary pass."""
    square = [name for name, p in dictionary.named_parameters() if p.ndim == 2 and p.shape[0] == p.shape[1]]
    passing = []
    for count in range(1, len(square) + 1):
        for chosen in itertools.combinations(square, count):
            other = copy.deepcopy(dictionary)
            with torch.no_grad():
                for name in chosen:
                    other.get_parameter(name).copy_(dictionary.get_parameter(name).T)
            fvu = _metrics(other, x, y)["fvu"]
            if fvu <= max_fvu:
                passing.append(f"{' and '.join(chosen)} transposed (FVU {fvu:.3g})")
    return f"; it would pass with {', or '.join(passing)}" if passing else ""

"""Dictionaries on disk: our own file, and folders of SAELens 6 in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from interp.cache import capture
from interp.dictionaries import _saelens
from interp.dictionaries._files import read_tensors, write_tensors
from interp.dictionaries._moments import Moments
from interp.dictionaries._run import plain
from interp.dictionaries.architectures import build
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.splicing import check_place
from interp.hooks.names import device_of

Format = Literal["auto", "interp", "saelens"]
FILE = "dictionary.safetensors"


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
    """A dictionary from a folder or file; what was read is in `.metadata`.

    Shapes alone cannot tell a matrix from its transpose, nor one hook from another of the same width. With a model and
    a few texts, the dictionary has to rebuild their activations; a wrong orientation or hook does not.

    Args:
        path: `dictionary.safetensors` or its folder (`save_dictionary`, `train`), or a folder of SAELens with
            `cfg.json` and `sae_weights.safetensors`.
        hook, target_hook: In place of what the file says.
        bridge, tokens: Check on activations of this model: L0 and FVU go into `.metadata["check"]`.
        max_fvu: Of this check: more is refused. 1 is what predicting the mean gives.
        device: Where to put it; that of the bridge, if one is given, else the CPU.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: For damaged files, unknown architectures or settings, shapes that do not fit, or a failed check,
            saying what was found.
    """
    path = Path(path)
    if (bridge is None) != (tokens is None):
        raise ValueError("a check needs both a bridge and tokens")
    if device is None:
        device = "cpu" if bridge is None else device_of(bridge)
    kind = _kind(path) if format == "auto" else format
    if kind == "interp":
        dictionary = _read(path / FILE if path.is_dir() else path, device)
    elif kind == "saelens":
        dictionary = _saelens.read(path, target_hook=target_hook, device=device)
    else:
        raise ValueError(f'format={format!r}; expected "auto", "interp" or "saelens"')
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


def _kind(path: Path) -> str:
    if path.is_file() and path.suffix == ".safetensors":
        return "interp"
    if (path / FILE).is_file():
        return "interp"
    if (path / "cfg.json").is_file():
        return "saelens"
    if not path.exists():
        raise FileNotFoundError(f"there is nothing at {path}")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:10]) if path.is_dir() else path.name
    raise ValueError(
        f"{path} is of no known format (found: {found}); expected {FILE}, or cfg.json and sae_weights.safetensors "
        f"of SAELens"
    )


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
    names = [dictionary.hook] if dictionary.target_hook is None else [dictionary.hook, dictionary.target_hook]
    check_place(bridge, dictionary)
    found = capture(bridge, tokens, names)
    x, y = (found[name][:, 1:].flatten(0, 1).flatten(1) for name in (names[0], names[-1]))  # without BOS
    for what, tensor, width in (("reads", x, dictionary.d_in), ("rebuilds", y, dictionary.d_out)):
        if tensor.shape[1] != width:
            raise ValueError(
                f"{path} {what} activations {width} wide, but those of {names} are {tensor.shape[1]} wide: another "
                f"model or hook"
            )
    with torch.no_grad():
        latents = dictionary.encode(x)
        moments = Moments(dictionary.n_latents, dictionary.d_out)
        moments.add(latents, y, dictionary.decode(latents, x))
    metrics = moments.metrics()
    dictionary.metadata["check"] = {"l0": metrics["l0"], "fvu": metrics["fvu"], "n_tokens": moments.n}
    if not metrics["fvu"] <= max_fvu:
        raise ValueError(
            f"{path} does not rebuild {names[-1]!r} of {bridge.cfg.model_name}: FVU {metrics['fvu']:.3g} at L0 "
            f"{metrics['l0']:.1f} on {moments.n} tokens, where {max_fvu:g} is allowed and 1 is what the mean gives. A "
            f"wrong hook, orientation or normalisation looks like this"
        )

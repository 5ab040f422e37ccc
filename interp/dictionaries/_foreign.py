"""What readers of other libraries' files share: reading without running code, and a dictionary from named tensors."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from interp.dictionaries.architectures import build
from interp.dictionaries.dictionary import Dictionary


class Found(NamedTuple):
    """What a reader made of some files.

    Attributes:
        settings: For `interp.dictionaries.build`.
        tensors: By the names of the dictionary's own parameters and buffers, in its orientation.
        record: What the files said, for `Dictionary.metadata`.
    """

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any]


def assemble(found: Found, source: Path, device: str | torch.device) -> Dictionary:
    """The dictionary, once every parameter is there in the right shape."""
    dictionary = build(found.settings, device=device)
    own = dict(dictionary.named_parameters())
    buffers = dict(dictionary.named_buffers())
    kind = found.settings["architecture"]
    require(found.tensors, set(own), set(buffers), source, kind)
    with torch.no_grad():
        for name, tensor in found.tensors.items():
            place = own.get(name, buffers.get(name))
            assert place is not None  # require() has seen to it
            if tensor.shape != place.shape:
                turned = tensor.ndim == 2 and tensor.T.shape == place.shape
                raise ValueError(
                    f"{name} in {source} is {tuple(tensor.shape)}, where the other sizes make it {tuple(place.shape)}"
                    f"{'; it looks transposed' if turned else ''}"
                )
            place.copy_(tensor)
    dictionary.metadata = found.record
    return dictionary


def require(tensors: dict[str, Tensor], names: set[str], optional: set[str], source: Path, kind: str) -> None:
    """Raise unless these tensors are there and no others."""
    missing, extra = sorted(names - set(tensors)), sorted(set(tensors) - names - optional)
    if missing or extra:
        raise ValueError(
            f"{source} does not hold a {kind} dictionary: missing {missing or 'nothing'}, unknown {extra or 'nothing'}"
        )


def linear(tensors: dict[str, Tensor], name: str, source: Path) -> Tensor:
    """The matrix of a torch Linear, [out, in] on disk, as [in, out]."""
    matrix = take(tensors, name, source)
    if matrix.ndim != 2:
        raise ValueError(f"{name} in {source} has {matrix.ndim} dimensions {tuple(matrix.shape)}; expected a matrix")
    return matrix.T


def take(tensors: dict[str, Tensor], name: str, source: Path) -> Tensor:
    """A tensor taken out of the rest, in float32 unless it holds float64 or whole numbers."""
    if name not in tensors:
        raise ValueError(f"{source} has no {name}; it has {', '.join(sorted(tensors)) or 'nothing'}")
    tensor = tensors.pop(name)
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def nothing_left(tensors: dict[str, Tensor], source: Path, kind: str) -> None:
    """Raise if a reader did not use all tensors: what it does not know may change what the dictionary does."""
    if tensors:
        raise ValueError(f"{source} is no {kind} file as this version knows it: unknown {', '.join(sorted(tensors))}")


def settings(architecture: str, d_in: int, n_latents: int, hook: str, **others: Any) -> dict[str, Any]:
    """Settings for `build`; a dictionary with a `target_hook` is a transcoder."""
    return {
        "architecture": architecture,
        "d_in": int(d_in),
        "n_latents": int(n_latents),
        "hook": hook,
        "dtype": "float32",
        **others,
    }


def said(config: dict[str, Any], key: str, source: Path) -> Any:
    """A setting that must be there."""
    if config.get(key) is None:
        raise ValueError(f"{source} does not say {key!r}; it says {', '.join(sorted(config)) or 'nothing'}")
    return config[key]


_POINTS = {  # what a module of transformers takes or gives, and the hook that holds it
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "self_attn.output": "attn.hook_out",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "mlp.input": "mlp.hook_in",
    "mlp.output": "mlp.hook_out",
}


def hook_of_module(point: str, source: Path) -> str:
    """The hook of a place named as in transformers, such as `model.layers.3.mlp.output`."""
    if re.fullmatch(r"(.*\.)?(embed_tokens|wte|embed_in)\.output", point):
        return "hook_embed"
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)[._](\d+)\.(.+)", point)
    inner = "" if match is None else re.sub(r"^(attn|attention)\.", "self_attn.", match[2])
    if match is None or inner not in _POINTS:
        raise ValueError(
            f"{source} was made for {point!r}, whose hook is not known here; known within a layer are "
            f"{', '.join(_POINTS)}. Name it yourself: hook=..."
        )
    return f"blocks.{match[1]}.{_POINTS[inner]}"


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; expected settings by name")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_npz(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or holds objects other than arrays: {error}") from error


def read_torch(path: Path) -> dict[str, Any]:
    """A file of `torch.save`, without running anything it may contain."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds objects other than tensors and plain values; it is not loaded, since such a "
            f"file can run any code: {error}"
        ) from error
    except (RuntimeError, EOFError, LookupError, ValueError, zipfile.BadZipFile) as error:  # whatever torn bytes say
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}; expected tensors by name")
    return found


def only_tensors(found: dict[str, Any], source: Path) -> dict[str, Tensor]:
    others = sorted(str(name) for name, value in found.items() if not isinstance(value, Tensor))
    if others:
        raise ValueError(f"{source} holds more than tensors: {', '.join(others)}")
    return dict(found)

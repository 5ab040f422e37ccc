"""What a loaded model is: its shape and family, where it came from, and whether it is fit to be measured."""

from __future__ import annotations

import functools
import hashlib
import platform
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import interp
from interp.hooks import editable, hook_name, names
from interp.models.directories import weight_files


@dataclass(frozen=True)
class Source:
    """Where a bridge came from: kept on the bridge by `load_model`."""

    model: str
    directory: Path | None  # None for a model given in memory
    commit: str | None  # of a hub snapshot
    fingerprint: int  # of the parameters as loaded: see `_fingerprint`
    tokens: Tensor | None = None  # of a model given in memory: a probe, and what it answered before it was wrapped
    log_probs: Tensor | None = None


@dataclass(frozen=True)
class Geometry:
    """Sizes and family of a model.

    Attributes:
        n_kv_heads: Key-value heads; fewer than `n_heads` where attention is grouped.
        d_mlp: Neurons per layer.
        norm: The kind of normalisation before each part of a block.
        gated: Whether the MLP multiplies a gate and a linear projection.
        grouped: Whether several heads share keys and values.
        parallel: Whether attention and MLP read the same stream, so that there is no resid_mid.
        post_norm: Whether the outputs of attention and MLP are normalised before they are added.
        positional: `"standard"` (learned, added to the embedding), `"rotary"`, `"alibi"`, ...
        soft_cap: The bound of the final logits, None if there is none.
        delegated_attention: Whether attention is computed where its pattern cannot be edited.
        has_bos: Whether `bridge.to_tokens` begins every text with a BOS token.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm: Literal["LayerNorm", "RMSNorm"]
    gated: bool
    grouped: bool
    parallel: bool
    post_norm: bool
    positional: str
    soft_cap: float | None
    delegated_attention: bool
    has_bos: bool


def geometry(bridge: Any) -> Geometry:
    """Sizes and family, read from the modules and probed where the configuration is silent or wrong."""
    cfg = bridge.cfg
    n_heads = int(cfg.n_heads)
    n_kv_heads = int(getattr(cfg, "n_key_value_heads", None) or n_heads)
    block = bridge.blocks[0]
    soft_cap = float(getattr(cfg, "output_logits_soft_cap", -1.0) or -1.0)
    pattern = hook_name("pattern", 0)
    return Geometry(
        n_layers=int(cfg.n_layers),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_model=int(cfg.d_model),
        d_head=int(cfg.d_head),
        d_mlp=_d_mlp(bridge),
        d_vocab=int(cfg.d_vocab),
        n_ctx=int(cfg.n_ctx),
        norm="RMSNorm" if bridge.ln_final.uses_rms_norm else "LayerNorm",
        gated=bool(cfg.gated_mlp),
        grouped=n_kv_heads < n_heads,
        parallel=not names(bridge, hook_name("resid_mid", 0)),
        post_norm="ln1_post" in block._modules or "ln2_post" in block._modules,
        positional=str(cfg.positional_embedding_type),
        soft_cap=soft_cap if soft_cap > 0 else None,
        delegated_attention=pattern not in names(bridge, pattern) or not editable(bridge, pattern),
        has_bos=_prepends_bos(bridge),
    )


def provenance(bridge: Any, **extra: Any) -> dict[str, Any]:
    """A JSON-able record of the model and the software: goes with every result.

    `revision` is the commit of a hub snapshot, else a hash of the weight files, else (a model given in memory, or
    parameters changed since loading) a hash of the parameters. Hashes are computed on the first call and remembered.
    """
    parameter = next(iter(bridge.original_model.parameters()))
    source = source_of(bridge)
    return {
        "model": source.model if source else str(bridge.cfg.model_name),
        "revision": _revision(bridge, source),
        "architecture": str(bridge.cfg.architecture),
        "weights_state": weights_state(bridge),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "versions": {
            "interp": interp.__version__,
            "torch": torch.__version__,
            "transformers": _version("transformers"),
            "transformer-lens": _version("transformer-lens"),
            "python": platform.python_version(),
        },
        **extra,
    }


def require_eval(bridge: Any) -> None:
    """Raise if any part of the model is in training mode, where dropout would make every measurement a random one."""
    if any(module.training for module in bridge.original_model.modules()):
        raise RuntimeError(f"{bridge.cfg.model_name} is in training mode; call bridge.eval() before measuring it")


def weights_state(bridge: Any) -> Literal["raw", "processed"]:
    """Whether the weights are as trained, or folded and centred by TransformerLens (`load_model(processed=True)`)."""
    return "processed" if getattr(bridge, "_weights_processed", False) else "raw"


def source_of(bridge: Any) -> Source | None:
    """What `load_model` noted; None for a bridge made otherwise."""
    return bridge.__dict__.get("_interp_source")


def fingerprint(bridge: Any) -> int:
    """Changes whenever a parameter is written to in place or replaced: a cheap stand-in for hashing them."""
    return hash(
        tuple(
            (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version)
            for parameter in bridge.original_model.parameters()
        )
    )


@contextmanager
def weights_put_back(bridge: Any) -> Iterator[None]:
    """For a change of parameters in place that is undone, bit for bit, before the context is left: afterwards the model
    counts as what was loaded again. Inside, its provenance says that it is not."""
    source = source_of(bridge)
    as_loaded = source is not None and fingerprint(bridge) == source.fingerprint
    try:
        yield
    finally:
        if source is not None and as_loaded:
            bridge.__dict__["_interp_source"] = replace(source, fingerprint=fingerprint(bridge))


@functools.cache
def _version(package: str) -> str:
    return metadata.version(package)  # reads a file


@dataclass
class _Hashes:
    files: str | None = None
    parameters: dict[int, str] = field(default_factory=dict)


_hashes: weakref.WeakKeyDictionary[Any, _Hashes] = weakref.WeakKeyDictionary()


def _revision(bridge: Any, source: Source | None) -> str:
    known = _hashes.setdefault(bridge, _Hashes())
    now = fingerprint(bridge)
    if source is not None and source.directory is not None and now == source.fingerprint:
        if source.commit is not None:
            return source.commit
        if known.files is None:
            known.files = _hash_files(weight_files(source.directory))
        return known.files
    if now not in known.parameters:
        known.parameters = {now: _hash_parameters(bridge)}
    return known.parameters[now]


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:16]}"


def _hash_parameters(bridge: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(bridge.original_model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"parameters:{digest.hexdigest()[:16]}"


def _d_mlp(bridge: Any) -> int:
    """From the output projection, since the configuration of TransformerLens has another number for some families
    (OPT)."""
    weight = bridge.blocks[0].mlp.W_out if "mlp" in bridge.blocks[0]._modules else None
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else int(bridge.cfg.d_mlp)


def _prepends_bos(bridge: Any) -> bool:
    tokenizer = bridge.tokenizer
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    return int(bridge.to_tokens("a")[0, 0]) == tokenizer.bos_token_id

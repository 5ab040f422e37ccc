"""One way in: an embedded name, a directory, a hub id or a transformers model becomes a frozen bridge in evaluation
mode."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from interp.models.check import self_check
from interp.models.directories import has_tokenizer, require_model
from interp.models.embedded import embedded_directory
from interp.models.hub import hub_directory
from interp.models.identity import Source, fingerprint

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16,
    "float64": torch.float64, "fp64": torch.float64, "double": torch.float64,
}  # fmt: skip


def load_model(
    source: Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    processed: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """A `TransformerBridge` of the model: evaluation mode, parameters frozen, weights as trained.

    Args:
        source: An embedded name (`interp.list_models()`), with a training checkpoint as `"tinyworld-llama@step-01000"`;
            a directory made by `save_pretrained`; a hub id, with a revision as `"owner/name@revision"`; or a
            transformers model, of which a copy is wrapped, so that the caller's stays as it is. An embedded name goes
            before a directory of the same name, a directory before a hub id.
        tokenizer: A tokenizer or a directory that holds one, if the source has none or another is wanted. It is copied.
        device: Where to put the model. By default the GPU if there is one, else the CPU (never MPS, which is known to
            give wrong numbers silently); a model given in memory stays where it is.
        dtype: `torch.bfloat16`, `"bfloat16"`, ... By default float32; a model given in memory keeps its own.
        processed: Fold norms into the weights that follow and centre what writes to the stream, as direct logit
            attribution needs (`enable_compatibility_mode`). Changes the residual stream, not the predictions; recorded
            in `provenance`.
        check: Run `interp.self_check` and print its summary line.
        trust_remote_code: Run the Python code that comes with some models.

    Raises:
        FileNotFoundError: If there is no such model, it is incomplete, or the hub cannot be reached (within a second).
        ValueError: If the source is no model, or an option cannot be honoured.
        PermissionError: If the model is gated; says how to get access, and what needs none.
    """
    kind = _dtype(dtype)
    place = _device(device)
    if isinstance(source, torch.nn.Module):
        bridge, noted = _from_memory(source, tokenizer, place, kind)
    else:
        name, directory, commit = _find(source, tokenizer is None, trust_remote_code)
        bridge, noted = _from_directory(
            name, directory, commit, tokenizer, place, kind or torch.float32, trust_remote_code
        )
    bridge.eval()
    if processed:
        with _silence():
            bridge.enable_compatibility_mode(disable_warnings=True)
    bridge.requires_grad_(False)
    object.__setattr__(bridge, "_interp_source", replace(noted, fingerprint=fingerprint(bridge)))
    if check:
        print(self_check(bridge).summary)  # noqa: T201
    return bridge


def _find(source: Any, needs_tokenizer: bool, code: bool) -> tuple[str, Path, str | None]:
    """Name to show, directory, and the commit if it is a hub snapshot."""
    if isinstance(source, str) and (found := embedded_directory(source)) is not None:
        return source, found, None
    if not isinstance(source, str | Path):
        raise ValueError(
            f"cannot load a {type(source).__name__}; "
            f"expected an embedded name, a directory, a hub id or a transformers model"
        )
    # always the absolute path: TransformerLens takes bare names such as "gpt2-small" for aliases of hub models
    directory = Path(source).expanduser().resolve()
    looks_like_path = (
        isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    )
    if looks_like_path or directory.is_dir() or not isinstance(source, str):
        require_model(directory, tokenizer=needs_tokenizer)
        return directory.name, directory, None
    snapshot = hub_directory(source, tokenizer=needs_tokenizer, code=code)
    return source, snapshot, snapshot.name


def _from_directory(
    name: str,
    directory: Path,
    commit: str | None,
    tokenizer: Any,
    device: torch.device | None,
    dtype: torch.dtype,
    code: bool,
) -> tuple[Any, Source]:
    from transformer_lens import TransformerBridge

    require_model(directory, tokenizer=False)
    home = directory
    if tokenizer is None and not has_tokenizer(home):
        home = directory.parents[1]  # a training checkpoint of an embedded model: NAME/checkpoints/STEP
    with _settled(home if tokenizer is None else tokenizer, code) as settled, _silence():
        bridge = TransformerBridge.boot_transformers(
            str(directory),
            device=str(device or _default_device()),
            dtype=dtype,
            tokenizer=settled,
            trust_remote_code=code,
        )
    bridge.cfg.model_name = name
    return bridge, Source(name, directory, commit, 0)


def _from_memory(
    model: torch.nn.Module, tokenizer: Any, device: torch.device | None, dtype: torch.dtype | None
) -> tuple[Any, Source]:
    from transformer_lens import TransformerBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    name = type(model).__name__
    if isinstance(model, TransformerBridge) or any(isinstance(part, GeneralizedComponent) for part in model.modules()):
        raise ValueError(
            f"this {name} is wrapped in a bridge already; pass the directory or the model as it was before"
        )
    config: Any = getattr(model, "config", None)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if config is None or head is None:
        raise ValueError(
            f"{name} is no causal language model of transformers (no unembedding); load it with AutoModelForCausalLM"
        )
    if tokenizer is None:
        raise ValueError(
            f"a model given in memory has no tokenizer; "
            f"pass tokenizer= (a tokenizer, or the directory of one) with {name}"
        )
    # TransformerLens replaces the modules of what it wraps and records dtype and device without applying them
    own: Any = copy.deepcopy(model).eval()
    own.config.architectures = [name]
    for parameter in own.parameters():
        parameter.grad = None
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)  # parameters alone: rotary tables stay in float32
    if device is not None:
        own = own.to(device)
    first = next(iter(own.parameters()))
    tokens = (torch.arange(8, device=first.device) % own.config.vocab_size).unsqueeze(0)
    with torch.no_grad():
        log_probs = own(tokens).logits.float().log_softmax(-1).cpu()
    with _settled(tokenizer, False) as settled, _silence():
        bridge = TransformerBridge.boot_transformers(
            "in-memory", hf_model=own, tokenizer=settled, device=str(first.device), dtype=first.dtype
        )
    title = Path(str(getattr(config, "_name_or_path", "") or name)).name
    bridge.cfg.model_name = title
    return bridge, Source(title, None, None, 0, tokens.cpu(), log_probs)


@contextmanager
def _settled(tokenizer: Any, code: bool) -> Iterator[Any]:
    """A copy of the tokenizer that TransformerLens neither reloads by name nor gives new ids to.

    It reloads every tokenizer without `add_bos_token` from where that came from (nowhere, for one made in memory; the
    hub, for one that came from there), and adds an end-of-text token past the model's vocabulary where there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(tokenizer, str | Path):
            home = Path(tokenizer).expanduser().resolve()
            if not has_tokenizer(home):
                raise FileNotFoundError(
                    f"{home} holds no tokenizer files; pass a directory with tokenizer.json, or a tokenizer"
                )
        elif isinstance(tokenizer, PreTrainedTokenizerBase):
            home = Path(scratch)
            tokenizer.save_pretrained(home)
        else:
            raise ValueError(
                f"tokenizer is a {type(tokenizer).__name__}; expected a transformers tokenizer or a directory"
            )
        try:
            settled = AutoTokenizer.from_pretrained(str(home), add_bos_token=True, trust_remote_code=code)
        except ValueError:  # no BOS token to add
            settled = AutoTokenizer.from_pretrained(str(home), trust_remote_code=code)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            settled.padding_side = tokenizer.padding_side
        settled.init_kwargs["add_bos_token"] = True
        settled.init_kwargs.setdefault("name_or_path", str(home))
        stand_in = settled.eos_token or settled.bos_token or settled.pad_token or settled.unk_token
        if settled.eos_token is None and stand_in is not None:
            settled.eos_token = stand_in
        yield settled


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype.removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"dtype={dtype!r} is not known; expected one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype.removeprefix("torch.")]
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is not a floating-point type; quantised weights are not supported")
    return dtype


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={str(device)!r}, but no CUDA device is available here; use device='cpu' or leave it out"
        )
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r}, but there are {torch.cuda.device_count()} CUDA devices, numbered from 0"
        )
    return place


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _silence() -> Iterator[None]:
    """No progress bars of transformers and no prints of TransformerLens; both as they were afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""Is this directory a whole model? Every doubt becomes an error before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


def require_model(directory: Path, *, tokenizer: bool) -> None:
    """Raise unless the directory holds a config, complete weights and, if asked for, a tokenizer.

    Raises:
        FileNotFoundError: Saying which part is missing and how to provide it.
        ValueError: If the directory is something else: an adapter, a placeholder of git-lfs, an encoder.
    """
    if not directory.exists():
        raise FileNotFoundError(f"there is no directory {directory}; pass a directory, an embedded name or a hub id")
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; pass the directory that holds config.json and the weights")
    if not (directory / "config.json").is_file():
        if (directory / "adapter_config.json").is_file():
            raise ValueError(
                f"{directory} holds an adapter, not a model; merge it into its base model first "
                f"(peft: merge_and_unload, then save_pretrained)"
            )
        raise FileNotFoundError(
            f"{directory} has no config.json; it holds {_listing(directory)}. Pass a directory made by save_pretrained"
        )
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("is_encoder_decoder"):
        raise ValueError(
            f"{directory} is an encoder-decoder model ({config.get('model_type')}); expected a causal language model"
        )
    files = weight_files(directory)
    if not files:
        raise FileNotFoundError(
            f"{directory} has a config.json but no weights (*.safetensors or pytorch_model*.bin); "
            f"it holds {_listing(directory)}"
        )
    for path in files:
        if path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a placeholder of git-lfs, not weights; run `git lfs pull` in {directory}")
    if tokenizer and not has_tokenizer(directory):
        raise FileNotFoundError(
            f"{directory} has no tokenizer files (tokenizer.json or tokenizer.model, ...); it holds "
            f"{_listing(directory)}. Without them transformers would hand back an empty tokenizer: save the tokenizer "
            f"there, or pass tokenizer="
        )


def has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def weight_files(directory: Path) -> list[Path]:
    """The files that `from_pretrained` reads, sorted by name.

    Raises:
        FileNotFoundError: If an index names a shard that is not there.
    """
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{whole}.index.json"
        if (directory / whole).is_file():
            return [directory / whole]
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in shards if not (directory / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{directory} is incomplete: {index.name} names {len(shards)} shards, missing {', '.join(missing)}"
                )
            return [directory / name for name in shards]
    return []


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"

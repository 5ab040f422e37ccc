"""Tables of token ids from files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def read_tokens(path: str | os.PathLike[str], tokenizer: Any, *, length: int | None = None) -> Tensor:
    """Token ids [example, pos] from a file: `.npy`, `.safetensors` (the tensor `tokens` or the only one) or text.

    Text is cut into rows of `length` tokens, each beginning with the tokenizer's BOS if it has one; the rest that does
    not fill a row is dropped, with a warning. Only text needs the tokenizer.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or it does not hold a table of whole numbers.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r} with tokens")
    if path.suffix == ".txt":
        return _cut(path.read_text(encoding="utf-8"), path, tokenizer, length)
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


def _cut(text: str, path: Path, tokenizer: Any, length: int | None) -> Tensor:
    import torch

    if length is None:
        raise ValueError(f"{path} is text: say how many tokens a row has, for example --length 64 or length = 64")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = length - len(start)
    rows = len(ids) // body if body > 0 else 0
    if rows == 0:
        raise ValueError(f"{path} has {len(ids)} tokens, too few for one row of {length}; shorten the rows or add text")
    if len(ids) % body:
        warnings.warn(
            f"dropped the last {len(ids) % body} of {len(ids)} tokens: they do not fill a row of {length}",
            stacklevel=3,
        )
    return torch.tensor([start + ids[i * body : (i + 1) * body] for i in range(rows)])

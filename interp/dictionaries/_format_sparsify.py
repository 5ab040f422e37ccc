"""EleutherAI's sparsify: a folder named after a module, with `cfg.json` and `sae.safetensors`.

TopK of the rectified pre-activations, as autoencoder of a module's output or as transcoder from its input to its
output. The decoder is stored latent by latent (SAELens 6 turns it round, and cannot load it).

Source: github.com/EleutherAI/sparsify, `SparseCoder`. Early versions subtracted `b_dec` from a transcoder's input too,
which the files do not tell; a check on activations does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from interp.dictionaries import _foreign
from interp.dictionaries._foreign import Found, linear, take

_REFUSED = {
    "signed": "latents of both signs",
    "embed_skip": "a skip connection from the embedding",
    "gram_lookup": "a lookup of preceding tokens",
}


def read(path: Path, hook: str | None, target_hook: str | None) -> Found:
    folder = path if path.is_dir() else path.parent
    source, file = folder / "cfg.json", folder / "sae.safetensors"
    config, tensors = _foreign.read_json(source), _foreign.read_safetensors(file)
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"{source} has activation {config['activation']!r}; readable is 'topk'")
    for name, what in _REFUSED.items():
        if config.get(name):
            raise ValueError(f"{source} has {name}={config[name]}: {what}, which no architecture here has")
    d_in = int(_foreign.said(config, "d_in", source))
    n_latents = int(config.get("num_latents") or d_in * _foreign.said(config, "expansion_factor", source))
    weights = {
        "W_enc": linear(tensors, "encoder.weight", file),
        "b_enc": take(tensors, "encoder.bias", file),
        "W_dec": take(tensors, "W_dec", file),
        "b_dec": take(tensors, "b_dec", file),
    }
    transcoder = bool(config.get("transcode"))
    options: dict[str, Any] = {"k": int(_foreign.said(config, "k", source)), "subtract_bias": not transcoder}
    if "W_skip" in tensors:
        weights["W_skip"] = take(tensors, "W_skip", file)
        options["skip"] = True
        if not transcoder:
            raise ValueError(f"{file} has a skip connection, but is an autoencoder: it passes its input through")
    _foreign.nothing_left(tensors, file, "sparsify")
    if target_hook is not None and not transcoder:
        raise ValueError(f"{source} is an autoencoder (transcode is false); target_hook={target_hook!r} is for others")
    if hook is None:
        hook = _foreign.hook_of_module(f"{folder.absolute().name}.{'input' if transcoder else 'output'}", source)
    if transcoder:
        options["d_out"] = len(weights["b_dec"])
        options["target_hook"] = target_hook or _foreign.hook_of_module(f"{folder.absolute().name}.output", source)
    record = {"format": "sparsify", "config": config}
    return Found(_foreign.settings("topk", d_in, n_latents, hook, **options), weights, record)

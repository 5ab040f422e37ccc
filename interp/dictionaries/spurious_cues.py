"""SHIFT: what a classifier of texts should not use is found among a dictionary's latents, and taken out of the model.

A probe trained where two labels always go together may have learned either. Its score is attributed to latents, a judge
says which of them stand for the wrong label, and these are off while texts are classified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp import hooks
from interp.cache import capture
from interp.dictionaries._steering_edits import token_shape
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.directions import Probe, fit_probe
from interp.dictionaries.relu import ReLUSAE
from interp.dictionaries.splicing import check_place, spliced
from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

Removed = Sequence[tuple[Dictionary, Sequence[int]]]
"""Latents by dictionary."""


@dataclass(frozen=True, eq=False)
class CuedTexts:
    """Texts with the label that is wanted and another one that may go along with it.

    Attributes:
        tokens: [text, pos], padded on the right if at all.
        intended, spurious: [text], bool.
        keep: [text, pos], the tokens that count: without BOS and padding.
    """

    tokens: Int[Tensor, "text pos"]
    intended: Bool[Tensor, " text"]
    spurious: Bool[Tensor, " text"]
    keep: Bool[Tensor, "text pos"]

    def __post_init__(self) -> None:
        if bare := (~self.keep.any(1)).nonzero()[:, 0].tolist():
            raise ValueError(f"texts {bare[:5]} keep no token: there is nothing to classify")

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, chosen: Tensor) -> CuedTexts:
        """Only these texts (indices or a bool mask)."""
        return CuedTexts(self.tokens[chosen], self.intended[chosen], self.spurious[chosen], self.keep[chosen])


@contextmanager
def without_latents(bridge: Any, removed: Removed, *, keep: Bool[Tensor, "batch pos"] | None = None) -> Iterator[None]:
    """In every forward inside the context these latents are 0; each dictionary's error is kept.

    Without latents nothing is changed, to the bit. Of several dictionaries later ones see what earlier ones left.

    Args:
        keep: Positions where latents are turned off; all by default.

    Raises:
        KeyError, ValueError: As `spliced`, and if a latent does not exist.
    """
    with ExitStack() as stack:
        for dictionary, latents in removed:
            if wrong := [int(i) for i in latents if not 0 <= int(i) < dictionary.n_latents]:
                raise ValueError(
                    f"latents {wrong[:8]} do not exist; the dictionary has 0 to {dictionary.n_latents - 1}"
                )
            index = torch.tensor([int(i) for i in latents], dtype=torch.long)
            if not len(index):
                continue

            def off(z: Tensor, _index: Tensor = index) -> Tensor:
                return z.index_fill(-1, _index.to(z.device), 0.0)

            stack.enter_context(spliced(bridge, dictionary, edit=off, keep=keep))
        yield


def pooled_activations(
    bridge: Any, texts: CuedTexts, hook: str, *, removed: Removed = (), batch_size: int = 64
) -> Float[Tensor, "text width"]:
    """Mean activation over the kept tokens of each text, with these latents off. One forward per batch."""
    found = []
    for part in torch.arange(len(texts)).split(batch_size):
        some = texts.select(part)
        with without_latents(bridge, removed, keep=some.keep):
            x = capture(bridge, some.tokens, hook)[hook].flatten(2).float().cpu()
        found.append(_pool(x, some.keep))
    return torch.cat(found)


def fit_text_probe(
    bridge: Any, texts: CuedTexts, hook: str, *, removed: Removed = (), l2: float | int = 1e-2, seed: int = 0
) -> Probe:
    """A logistic probe of the intended label on `pooled_activations`; see `fit_probe`."""
    return _fitted(pooled_activations(bridge, texts, hook, removed=removed), texts, hook, l2, seed)


@dataclass(frozen=True, eq=False, repr=False)
class ProbeAttribution(Result):
    """What latents contribute to a probe's margin for the intended label.

    `values` has the dimensions (node, example), in log-odds: positive where the latent speaks for the label that the
    text has. A node is a latent of one of the dictionaries.

    Attributes:
        active: (node,), share of kept tokens on which the latent is on.
    """

    active: xr.DataArray

    def to_dataframe(self) -> pd.DataFrame:
        """One row per latent, largest mean first in magnitude: `dictionary, latent, attribution, active`."""
        import pandas as pd

        mean = self.values.mean("example").values
        frame = pd.DataFrame({name: self.values[name].values for name in ("dictionary", "latent")})
        frame = frame.assign(attribution=mean, active=self.active.values)
        return frame.loc[frame["attribution"].abs().sort_values(ascending=False, kind="stable").index]

    def plot(self, k: int = 20) -> Any:
        """Figure: the latents that contribute most."""
        from interp.plotting import bars

        frame = self.to_dataframe().head(k)
        names = frame["dictionary"].astype(str) + "." + frame["latent"].astype(str)
        return bars(
            frame.assign(node=names), x="node", y="attribution", title="Latents that a probe's margin comes from",
            unit="mean contribution to the margin (log-odds)", x_title="dictionary.latent",
        )  # fmt: skip


def attribute_probe(
    bridge: Any,
    probe: Probe,
    texts: CuedTexts,
    dictionaries: Sequence[Dictionary],
    *,
    method: Literal["gradient", "ig"] = "gradient",
    n_steps: int = 10,
    batch_size: int = 64,
) -> ProbeAttribution:
    """Latents' contributions to a probe's margin on each text, summed over its kept tokens.

    `"gradient"`: activation times gradient, a first-order estimate of what the latent's absence would take away; exact
    where the probe reads the dictionary's own hook. `"ig"`: the gradient averaged over midpoints between all latents
    off and as they are, the error kept, so that a dictionary's contributions sum to the margin less that without all of
    its latents. Each dictionary is looked at alone, the model intact elsewhere; gradients do not pass through others.
    Costs a forward and a backward per batch and dictionary, times `n_steps` for `"ig"`.

    Raises:
        KeyError, ValueError: As `spliced`, or if the probe does not depend on a dictionary (it reads an earlier hook).

    Source:
        Marks et al. 2024 (arXiv:2403.19647), section 4 and appendix: their integrated gradients take a left sum that
        starts at the activation and leaves out zero; midpoints here. They pass gradients straight through dictionaries.
    """
    require_eval(bridge)
    sign = texts.intended.float() * 2 - 1
    names, latents, parts, active = [], [], [], []
    for number, dictionary in enumerate(dictionaries):
        check_place(bridge, dictionary)
        found, on = [], torch.zeros(dictionary.n_latents)
        for rows in torch.arange(len(texts)).split(batch_size):
            some = texts.select(rows)
            given, fired = _contributions(bridge, probe, some, dictionary, method, n_steps)
            found.append(sign[rows][:, None] * given)
            on += fired
        parts.append(torch.cat(found).T)
        active.append(on / int(texts.keep.sum()))
        names += [number] * dictionary.n_latents
        latents += range(dictionary.n_latents)
    coords = {"dictionary": ("node", names), "latent": ("node", latents)}
    record = provenance(bridge, method="attribute_probe", kind=method, hooks=[d.hook for d in dictionaries])
    record |= {"probe_hook": probe.hook, "n_steps": n_steps if method == "ig" else 1}
    return ProbeAttribution(
        labelled(torch.cat(parts), ("node", "example"), {**coords, "example": range(len(texts))}, unit="log-odds"),
        record,
        labelled(torch.cat(active), ("node",), coords),
    )


def units_as_latents(bridge: Any, hook: str) -> ReLUSAE:
    """The units of a hook as a dictionary without error, to hold latents against: two latents for each unit, latent i
    its positive part and latent i + width its negative part.

    Raises:
        KeyError, ValueError: If the hook does not hold one vector per token that can be edited.
    """
    (width,) = token_shape(bridge, hook)
    units = ReLUSAE(width, 2 * width, hook=hook, device=str(device_of(bridge))).requires_grad_(False)
    eye = torch.eye(width, device=units.W_dec.device, dtype=units.W_dec.dtype)
    units.W_enc.copy_(torch.cat([eye, -eye], 1))
    units.W_dec.copy_(torch.cat([eye, -eye]))
    check_place(bridge, units)
    return units


def _contributions(
    bridge: Any, probe: Probe, texts: CuedTexts, dictionary: Dictionary, method: str, n_steps: int
) -> tuple[Float[Tensor, "text latent"], Float[Tensor, " latent"]]:
    shares = [(step + 0.5) / n_steps for step in range(n_steps)] if method == "ig" else [1.0]
    total, z = None, None
    for share in shares:
        scale: Callable[[Tensor], Tensor] | None = None if share == 1.0 else lambda z, _s=share: z * _s
        with (
            torch.enable_grad(),
            spliced(bridge, dictionary, edit=scale, keep=texts.keep) as inside,
            hooks.taps(bridge, probe.hook) as seen,
        ):
            bridge(texts.tokens.to(device_of(bridge)))
            x = seen[probe.hook].flatten(2).float()
            score = probe.score(_pool(x, texts.keep.to(x.device)))
        assert inside.latents is not None
        (grad,) = torch.autograd.grad(score.sum(), [inside.latents], allow_unused=True)
        if grad is None or not bool(grad.any()):
            raise ValueError(
                f"the probe at {probe.hook!r} does not depend on the dictionary of {dictionary.hook!r}; take one of an "
                f"earlier hook, or a probe of a later one"
            )
        z = inside.latents.detach()
        total = grad / share if total is None else total + grad / share
    assert z is not None and total is not None
    kept = texts.keep.to(z.device)[..., None]
    return (z * total / len(shares) * kept).sum(1).cpu(), ((z != 0) & kept).sum((0, 1)).float().cpu()


def _pool(x: Float[Tensor, "text pos width"], keep: Tensor) -> Float[Tensor, "text width"]:
    return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


def _fitted(x: Tensor, texts: CuedTexts, hook: str, l2: float | int, seed: int) -> Probe:
    return fit_probe(x[texts.intended], x[~texts.intended], hook=hook, l2=l2, seed=seed)

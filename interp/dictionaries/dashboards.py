"""Dashboards: a page of what each latent, feature or neuron fires on and writes, and an index of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.dictionaries._dashboard_columns import Columns
from interp.dictionaries._dashboard_contexts import Facets
from interp.dictionaries._dashboard_directions import Effects, Nearest
from interp.dictionaries._dashboard_folder import Folder
from interp.dictionaries._dashboard_index import index_of
from interp.dictionaries._dashboard_labels import LabelScores
from interp.dictionaries._dashboard_options import Options
from interp.dictionaries._dashboard_pages import Pages
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.rows import TokenRows
from interp.dictionaries.snmf import SNMF
from interp.hooks import hook_name
from interp.hooks.names import layer_of
from interp.neurons._sides import side_vectors

if TYPE_CHECKING:
    import pandas as pd

    from interp.plotting.latent_index import LatentIndex
    from interp.plotting.latent_page import LatentPage

_TOGETHER = 32  # pages made at a time, so that their contexts are searched in one pass


class Dashboard:
    """Pages of single units and an index of all; made by `dashboard` and the class methods. No forward is run.

    Pages and index are HTML with everything inside: no network, and no script but the index's own. Every token is
    escaped. What a page shows, and how it is computed:

    - activations: how many tokens in 40 bins where the unit is not zero, and its density, the share of tokens on which
      it fires (is above `threshold` times its largest activation, and above 0);
    - the strongest contexts (`interp.neurons.contexts_of`, each once) and some drawn at random from four equal bands of
      activation, since the strongest alone flatter a unit; of units with a negative side the most negative ones too;
    - facets: the 60 strongest contexts divided by label, by token or by clusters of the activations there;
    - direct effects on logits of the unit's direction at norm 1, as `output_tokens`, beside those of random directions;
    - AUROC for every label on documents that had no part in ranking the labels, as `label_features`, with intervals;
    - the tokens that carry most of its activation, and how often it fires on them;
    - the nearest other directions by cosine (of what they write, if they are not in the stream themselves), and the
      units whose activations are most correlated with its own.

    Attributes:
        kind: What the units are called: latent, feature or neuron.
        n_units, n_tokens: Sizes.
        provenance: The model, the rows and the settings.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._index: LatentIndex | None = None
        self.kind, self.provenance = pages.kind, pages.provenance
        self.n_units, self.n_tokens = pages.columns.n_units, pages.columns.n_tokens

    @classmethod
    def of_dictionary(
        cls, bridge: Any, dictionary: Dictionary, rows: TokenRows, *, batch_size: int = 1024, **options: Any
    ) -> Dashboard:
        """The latents of a dictionary, on rows of the activations that it reads.

        Rows are encoded `batch_size` at a time and only latents that are not zero are kept. (What a Feature Choice
        dictionary gives a token depends on the others of its batch.)

        Args:
            options: As in `dashboard`.

        Raises:
            ValueError: If the rows are of another hook.
        """
        if rows.hook != dictionary.hook and dictionary.hook:
            raise ValueError(f"the dictionary reads {dictionary.hook!r} and the rows are of {rows.hook!r}; make them "
                             f"with token_rows(bridge, tokens, {dictionary.hook!r})")  # fmt: skip
        directions = dictionary.directions().detach()
        hook = dictionary.target_hook or rows.hook
        return dashboard(
            bridge, rows, dictionary.encode, directions=directions, hook=hook, kind="latent", batch_size=batch_size,
            source=dictionary.settings(), **options,
        )  # fmt: skip

    @classmethod
    def of_snmf(
        cls, bridge: Any, snmf: SNMF, rows: TokenRows, *, threshold: float | int = 0.1, **options: Any
    ) -> Dashboard:
        """The components of a factorisation of MLP neurons. A feature counts as firing above a tenth of its largest
        activation, as in `FeatureReading`: least squares leaves small activations everywhere.

        Raises:
            ValueError: If the factorisation is not fitted, or the rows have another number of neurons.
        """
        return dashboard(
            bridge, rows, snmf.transform, directions=snmf.components_, kind="feature", threshold=threshold,
            source=snmf.provenance, **options,
        )  # fmt: skip

    @classmethod
    def of_neurons(cls, bridge: Any, rows: TokenRows, *, threshold: float | int = 0.1, **options: Any) -> Dashboard:
        """The neurons of a layer, on rows of its `mlp.hook_post`. Directions are the neurons' rows of W_out.

        Raises:
            ValueError: If the rows are not of neurons.
        """
        layer = layer_of(bridge, rows.hook)
        if layer is None or not 0 <= layer < len(bridge.blocks) or rows.hook != hook_name("neuron", layer):
            raise ValueError(f"the rows are of {rows.hook!r}; expected those of a layer's neurons, such as "
                             f"token_rows(bridge, tokens, hook_name('neuron', 0))")  # fmt: skip
        names = [f"L{layer}N{i}" for i in range(rows.values.shape[1])]
        # folded vectors live where the MLP's output enters the stream, also behind a norm of its own (Gemma 2)
        directions = side_vectors(bridge, layer, "out")
        return dashboard(
            bridge, rows, rows.values, directions=directions, hook=hook_name("mlp_out", layer), kind="neuron",
            threshold=threshold, **{"names": names, **options},
        )  # fmt: skip

    def __repr__(self) -> str:
        model, hook = self.provenance["model"], self.provenance["hook"]
        return f"Dashboard({self.n_units} {self.kind}s of {hook} on {self.n_tokens} tokens; {model})"

    def show(self, unit: int | str) -> LatentPage:
        """The page of one unit, by number or name; it shows itself in a notebook. `.contexts().figure()`,
        `.histogram()` and `.table(title)` give its parts."""
        return self._pages.of([self._pages.number(unit)])[0]

    def index(self) -> LatentIndex:
        """One row per unit; it shows itself in a notebook. Computed once."""
        if self._index is None:
            self._index = index_of(self._pages)
        return self._index

    def to_dataframe(self) -> pd.DataFrame:
        """The index as a table: density, activations, tokens fired on, promoted and suppressed, label, neighbour."""
        return self.index().frame.copy()

    def save(
        self,
        folder: str | os.PathLike[str],
        units: Sequence[int | str] | None = None,
        *,
        overwrite: bool = False,
        progress: bool = False,
    ) -> Path:
        """Write the index, and the pages of these units or of all, and give the path of `index.html`.

        The folder holds `index.html`, `latents/00042.html` and `dashboard.json`, which says what they are of. Every
        file is there whole or not at all. Pages that are there are left alone unless `overwrite`, so that a stopped run
        goes on where it was, and later calls add pages; the index links to all of them.

        Raises:
            ValueError: If the folder holds something else, or pages of another dashboard and not `overwrite`.
        """
        chosen = range(self.n_units) if units is None else [self._pages.number(unit) for unit in units]
        target = Folder(folder, self.n_units, self._pages.fingerprint(), self.provenance)
        target.claim(overwrite)
        index = self.index()
        index.save_html(target.index, pages=target.pages())  # there from the first page on
        left = [unit for unit in chosen if overwrite or not target.page(unit).exists()]
        with tqdm(total=len(left), desc="pages", disable=None if progress else True) as bar:
            for start in range(0, len(left), _TOGETHER):
                for page in self._pages.of(left[start : start + _TOGETHER]):
                    page.save_html(target.page(page.number), index="../index.html")
                    bar.update()
        return index.save_html(target.index, pages=target.pages())


def dashboard(
    bridge: Any,
    rows: TokenRows,
    activations: Float[Tensor, "token unit"] | Callable[[Tensor], Tensor],
    *,
    directions: Float[Tensor, "direction width"] | None = None,
    hook: str | None = None,
    labels: Mapping[str, Tensor] | None = None,
    names: Sequence[str] | None = None,
    kind: str = "unit",
    threshold: float | int = 0.0,
    facets: Facets | None = None,
    effects: bool = True,
    n_contexts: int = 20,
    n_tokens: int = 10,
    n_neighbours: int = 8,
    window: tuple[int, int] = (12, 5),
    level: float = 0.95,
    batch_size: int = 1024,
    seed: int = 0,
    source: Mapping[str, Any] | None = None,
) -> Dashboard:
    """A dashboard of any activations of these rows. `Dashboard.of_dictionary`, `.of_snmf` and `.of_neurons` call this.

    Args:
        rows: The tokens (see `token_rows`).
        activations: [token, unit]; or what makes them from `rows.values`, which is given `batch_size` rows at a time.
            Where less than a fifth of the entries are not zero only these are kept.
        directions: What one unit adds at `hook`, a row for each; without them there are no effects and no nearest
            directions.
        hook: Where the directions are, the hook of the rows by default.
        labels: `{name: [token] bool}`, see `label_masks`.
        names: One per unit; `latent 17` and so on by default.
        kind: What the units are called.
        threshold: A unit fires above this share of its largest activation, and above 0.
        facets: How the strongest contexts are divided: by `"label"` (the default where there are labels), by `"token"`,
            or by `"cluster"` (Ward, of the rows' activations; a division is shown if it stands out from one cloud, see
            `interp.neurons.facets`, and the page says whether as many tokens drawn at random divide as well; slower).
        effects: False for directions that are not written to the residual stream.
        n_contexts, n_tokens, n_neighbours: How many contexts, tokens of each side, and neighbours.
        window: Tokens before and after.
        level: Of intervals.
        seed: Of contexts drawn at random and of clusters.
        source: What the units are of, for provenance.

    Raises:
        ValueError: If sizes do not fit, activations are not finite, labels are given for fewer than four documents, or
            directions at `hook` have no direct effect on logits.

    Source:
        Contents after SAEVis and Neuronpedia: histogram, strongest and banded contexts, logit effects, neighbours.
        Labels, intervals, facets and the random directions beside the effects are ours.
    """
    divided = facets or ("token" if labels is None else "label")
    options = Options(divided, n_contexts, n_tokens, n_neighbours, window, seed)
    options.check(labels is not None)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}; expected a share of the largest activation, 0 <= threshold < 1")
    if batch_size < 1 or not 0 < level < 1:
        raise ValueError(f"batch_size={batch_size}, level={level}; expected at least 1, and between 0 and 1")
    if isinstance(activations, Tensor) and len(activations) != len(rows):
        raise ValueError(f"activations have {len(activations)} rows and there are {len(rows)} tokens")
    scores = None if labels is None else LabelScores(rows, labels, float(level))
    where = hook or rows.hook
    written = None if directions is None or not effects else Effects(bridge, where, directions)
    columns = Columns.of(rows.values, activations, threshold=float(threshold), batch_size=batch_size)
    for what, some in (("directions", directions), ("names", names)):
        if some is not None and len(some) != columns.n_units:
            raise ValueError(f"{len(some)} {what} for {columns.n_units} units; expected one each")
    record = {
        **rows.provenance, "method": "dashboard", "kind": kind, "hook": rows.hook, "directions_at": where,
        "n_tokens": len(rows), "threshold": float(threshold), "source": dict(source or {}), "cost": {"forwards": 0},
        **options.record(),
    }  # fmt: skip
    nearest = None if directions is None else Nearest(directions, written)
    norms = None if directions is None else directions.detach().float().norm(dim=1).cpu().numpy()
    named = [f"{kind} {i}" for i in range(columns.n_units)] if names is None else [str(name) for name in names]
    return Dashboard(Pages(bridge, rows, columns, scores, written, nearest, norms, named, kind, options, record))

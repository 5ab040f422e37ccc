"""One table of how well several methods agree with exact patching at several sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from interp.patching.agreement import agreement
from interp.patching.effects import Effects

if TYPE_CHECKING:
    import pandas as pd


def agreement_table(
    exact: Mapping[Any, Effects],
    estimates: Mapping[str, Mapping[Any, Effects]],
    *,
    k: int = 10,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per method, site and statistic of `agreement`: `method`, `site`, `statistic`, `estimate`, `low`, `high`.

    Costs no forward. A site that a method has no scores for (queries under frozen attention) has no row.

    Args:
        exact: Results of `activation_patch` by site.
        estimates: Results of `attribution_patch`, by a name of your own for each method.
        k, level, n_resamples, seed: As for `agreement`.

    Raises:
        ValueError: As `agreement`; or if a method has scores at a site without exact effects.

    Example:
        >>> methods = ("gradient", "relp")
        >>> estimates = {name: interp.patching.attribution_patch(bridge, p, m, method=name) for name in methods}
        >>> interp.patching.agreement_table(exact, estimates).query("statistic == 'pearson'")
    """
    import pandas as pd

    unknown = sorted({site for scores in estimates.values() for site in scores} - set(exact))
    if unknown:
        raise ValueError(
            f"there are scores at {unknown} but exact effects only at {sorted(exact)}; patch these sites too"
        )
    rows: list[dict[str, object]] = []
    for method, scores in estimates.items():
        for site, approximation in scores.items():
            found = agreement(exact[site], approximation, k=k, level=level, n_resamples=n_resamples, seed=seed)
            for row in found.to_dataframe().to_dict("records"):
                rows.append({"method": method, "site": site, **{str(name): value for name, value in row.items()}})
    return pd.DataFrame(rows, columns=["method", "site", "statistic", "estimate", "low", "high"])

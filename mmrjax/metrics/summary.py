"""Summary of a metric over domains and categories, and the rounding of the official MMR tables."""

from collections.abc import Iterable, Mapping

import numpy as np

from mmrjax.metrics.domain import METRICS

OFFICIAL_MODE = "mmr"  # value of eval.metrics_mode: truth and rounding as in the official code

# The official code rounds these metrics of every class or domain before it averages them. It does
# not round pixel AUROC (quirk 21).
OFFICIAL_DECIMALS = {"image_auroc": 3, "pro_mmr": 3}


def officially_rounded(entry: Mapping) -> dict:
    """A domain's entry of results.json with the values that the official tables average."""
    rounded = dict(entry)
    for name, decimals in OFFICIAL_DECIMALS.items():
        if entry.get(name) is not None:
            rounded[name] = round(entry[name], decimals)
    return rounded


def largest_errors(entries: Iterable[Mapping]) -> dict[str, float]:
    """Largest possible distance of each inexact metric from its exact value, over many entries.

    Args:
        entries: metrics of results.json, from `Measured.report`; exact entries lack "bounds".

    Returns:
        {metric: fraction}, empty if everything is exact.
    """
    errors: dict[str, float] = {}
    for entry in entries:
        for name, (low, high) in entry.get("bounds", {}).items():
            error = max(entry[name] - low, high - entry[name])
            errors[name] = max(error, errors.get(name, 0.0))
    return errors


def summarise(
    per_key_metrics: Mapping[str, Mapping[str, Mapping]], reference_domain: str | None = None
) -> dict[str, dict]:
    """Summary over all categories: mean, worst, and the gap to the unshifted domain.

    The mean is taken over a category's named domains (`all` and "" count only if there are no
    others), then over categories, so a category with many domains or many images weighs no more
    than another.

    Args:
        per_key_metrics: {"<dataset>/<category>": {"<domain>" or "all": {metric: value}}}; a value
            is a number, None if undefined, or {"mean": ..., "seeds": {seed: number or None}}.
        reference_domain: name of the unshifted domain, or None.

    Returns:
        {metric: {"mean", "std" (over seeds of the summary mean, n - 1; None below two seeds),
        "worst": {"value", "where"} (where = key/domain, or key alone for `all`), "gap_to_reference"
        (mean of the other domains minus the reference, negative = a loss under shift, mean over
        categories; None without both)}, "left_out": [where, ...] if some values are undefined, and
        "datasets": {dataset: mean over its categories} if there are several data sets}. A metric
        that is undefined everywhere is absent.
    """
    summary = {}
    for metric in METRICS:
        table = {
            key: {domain: _value(values.get(metric)) for domain, values in _named(domains).items()}
            for key, domains in per_key_metrics.items()
        }
        flat = {_where(key, d): v for key, row in table.items() for d, v in row.items()}
        defined = {where: value for where, value in flat.items() if value is not None}
        if not defined:
            continue
        worst = min(defined, key=defined.get)
        summary[metric] = {
            "mean": _mean_of_means(table),
            "std": _seed_std(per_key_metrics, metric),
            "worst": {"value": defined[worst], "where": worst},
            "gap_to_reference": _gap(table, reference_domain),
        }
        if len(defined) < len(flat):
            summary[metric]["left_out"] = [where for where in flat if where not in defined]
        if len(apart := _by_dataset(table)) > 1:
            summary[metric]["datasets"] = apart
    return summary


def _named(domains: Mapping[str, Mapping]) -> Mapping[str, Mapping]:
    """The named domains of a category; all domains if none is named."""
    return {d: v for d, v in domains.items() if d not in ("all", "")} or domains


def _where(key: str, domain: str) -> str:
    """Place of a value in words."""
    return key if domain in ("all", "") else f"{key}/{domain}"


def _value(entry: float | Mapping | None) -> float | None:
    """The number of an entry that may be a mean over seeds."""
    return entry.get("mean") if isinstance(entry, Mapping) else entry


def _by_dataset(table: Mapping[str, Mapping]) -> dict[str, float | None]:
    """The mean of each data set, also of data sets that one model has learned together.

    Joined records have one key for all, and "<dataset>/<category>" as domains.
    """
    parts: dict[str, dict[str, dict]] = {}
    for key, row in table.items():
        for domain, value in row.items():
            part = domain if "/" in domain else key
            own = parts.setdefault(part.split("/")[0], {})
            own.setdefault(part, {})[domain] = value
    return {dataset: _mean_of_means(own) for dataset, own in parts.items()}


def _mean_of_means(table: Mapping[str, Mapping]) -> float | None:
    """Mean over categories of the mean over domains, of the defined values."""
    rows = [[v for v in row.values() if v is not None] for row in table.values()]
    means = [np.mean(row) for row in rows if row]
    return float(np.mean(means)) if means else None


def _gap(table: Mapping[str, Mapping], reference: str | None) -> float | None:
    """Mean over categories of (mean of the other domains - reference); negative = a loss."""
    gaps = []
    for row in table.values():
        others = [v for d, v in row.items() if d != reference and v is not None]
        if reference in row and row[reference] is not None and others:
            gaps.append(np.mean(others) - row[reference])
    return float(np.mean(gaps)) if gaps else None


def _seed_std(per_key_metrics: Mapping, metric: str) -> float | None:
    """Standard deviation over seeds of the summary mean, over the seeds that every value has."""
    entries = [
        {domain: values.get(metric) for domain, values in _named(domains).items()}
        for domains in per_key_metrics.values()
    ]
    values = [e for row in entries for e in row.values() if _value(e) is not None]
    if not all(isinstance(e, Mapping) for e in values):
        return None
    shared = set.intersection(
        *({s for s, v in e.get("seeds", {}).items() if v is not None} for e in values)
    )
    means = [
        _mean_of_means(
            {
                i: {d: e["seeds"][seed] if _value(e) is not None else None for d, e in row.items()}
                for i, row in enumerate(entries)
            }
        )
        for seed in sorted(shared)
    ]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None

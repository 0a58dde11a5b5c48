"""The report's numbers as sentences for a reader who reads nothing else: plain text, no HTML.

`aggregate` is results.json of a work directory as `files.read_workdir` returns it: nested dicts. A
sentence claims no more than its number: the methods count as equal if the interval of their
difference contains zero.
"""

import math
from collections.abc import Mapping

import numpy as np

from mmrjax.report import tables

ROLES = ("teacher", "student")  # networks whose weights a run's facts name
FALSE_ALARMS = 0.05  # share of good images that the headline sentence lets be rejected


def detection_rate(scores: np.ndarray, is_anomaly: np.ndarray) -> float | None:
    """Share of defective images that score above all but 5 % of the good images.

    The rate only describes the test scores; no threshold is taken from it.

    Returns:
        A fraction, or None with fewer than 20 good images or without a defective image.
    """
    good, bad = np.sort(scores[~is_anomaly])[::-1], scores[is_anomaly]
    if good.size < 1 / FALSE_ALARMS or not bad.size:
        return None
    cut = good[math.floor(FALSE_ALARMS * good.size + 1e-9)]
    return float(np.mean(bad > cut))


def headline_cell(content: Mapping) -> tables.Cell:
    """The main number of a method: image AUROC of its only category, else the mean over all."""
    number = _headline(content, "image_auroc")
    return tables.Cell(tables.percent(number.get("mean")), tables.spread(number))


def answer(aggregate: Mapping, method: str, rate: float | None) -> list[str]:
    """The results of a method as sentences.

    Args:
        aggregate: results.json of the work directory.
        method: a key of its "methods".
        rate: `detection_rate`, mean over runs; None leaves that sentence out.
    """
    content = aggregate["methods"][method]
    title = content["title"]
    metrics, keys = content["metrics"], list(content["metrics"])
    several = len(keys) > 1
    main = _headline(content, "image_auroc")
    sentences = []
    if rate is not None:
        sentences.append(
            f"{title} finds {tables.percent(rate)} % of the defective images when "
            f"{100 * FALSE_ALARMS:.0f} % of the good ones may be rejected by mistake."
        )
    if tables.is_number(main.get("mean")):
        who = "It" if rate is not None else title
        seeds = len(main.get("seeds") or {})
        details = ["image AUROC"]
        details += [f"mean over {len(keys)} categories"] if several else []
        details += [f"mean ± std over {seeds} seeds"] if seeds > 1 else []
        interval = tables.interval(main.get("ci95"))
        details += [f"95 % interval {interval} %"] if interval else []
        sentences.append(
            f"{who} scores a defective image above a good one in {_with_std(main)} % of all pairs "
            f"({'; '.join(details)}; guessing gives 50 %)."
        )
    else:
        sentences.append(f"{title}: image AUROC is undefined here{_why(content)}.")
    region = _headline(content, "aupro_0.3")
    if tables.is_number(region.get("mean")):
        sentences.append(f"Locating the defects, it reaches an AUPRO of {_with_std(region)} %.")
    sentences += _weakest(metrics, content.get("summary") or {}, aggregate.get("reference_domain"))
    return sentences


def protocol(facts: Mapping) -> dict[str, str]:
    """The origin of a run's numbers as {term: text}: mode, truth, weights and versions.

    Args:
        facts: the facts in the run's results.json.
    """
    truth = facts.get("ground_truth") or {}
    terms = {"metric mode": "metrics_mode", "masks": "masks", "labels": "labels"}
    lines = {term: str(truth[name]) for term, name in terms.items() if name in truth}
    lines["evaluated"] = "the weights of the last epoch; no score chose them"
    for role in ROLES:
        weights = facts.get(role) or {}
        if weights:
            digest = f", sha256 {weights['sha256']}" if weights.get("sha256") else ""
            lines[role] = f"{weights.get('name') or ''} {_source(weights)}".strip() + digest
    if facts.get("versions"):
        lines["versions"] = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    return lines


def departures(facts: Mapping, paper_weights: Mapping[str, str]) -> list[str]:
    """The networks whose weights are random or others than the paper's, a sentence each.

    Args:
        facts: the facts in the run's results.json.
        paper_weights: {role: start of the weights file's name}, of the run's method.
    """
    sentences = []
    for role, wanted in paper_weights.items():
        weights = facts.get(role) or {}
        # A file of `mmrjax.convert` holds the same weights as the file that it was converted from.
        original = weights.get("converted_from") or weights
        published = str(original.get("source") or "").startswith(wanted)
        # Some names carry the publisher's hash: a renamed file is not the paper's.
        _, _, digits = wanted.partition("-")
        if weights and not (published and str(original.get("sha256") or "").startswith(digits)):
            kind = "random weights" if _is_random(weights) else "weights other than the paper's"
            name = f" {weights['name']}" if weights.get("name") else ""
            sentences.append(f"the {role}{name} has {kind} ({_source(weights)}; paper: {wanted})")
    return sentences


def _is_random(weights: Mapping) -> bool:
    return weights.get("random") is True or weights.get("init") == "scratch"


def _source(weights: Mapping) -> str:
    """The origin of weights: a file, the file that it was converted from, or the initialiser."""
    name = str(weights.get("source") or weights.get("init") or "of unknown origin")
    original = weights.get("converted_from")
    return f"{name} (converted from {original['source']})" if original else name


def comparison_sentence(comparison: Mapping, a: str, b: str, several_keys: bool) -> str:
    """A paired comparison in words that claim no more than its interval allows.

    Args:
        comparison: an entry of results.json.
        a: title of its first method.
        b: title of its second method.
        several_keys: names the category.
    """
    name = tables.metric(comparison["metric"]).title
    head = f"{name} on {comparison['key']}: " if several_keys else f"{name}: "
    difference, ci95 = comparison.get("difference"), comparison.get("ci95")
    if not tables.is_number(difference):
        return f"{head}{a} and {b} cannot be compared: the metric is undefined for one of them."
    head += f"{a} is {_points(difference)} {b}"
    if not tables.interval(ci95):
        return f"{head}; no interval was computed, so do not read much into it."
    low, high = ci95
    head += f" (95 % interval: from {_points(low, short=True)} to {_points(high, short=True)})."
    if low > 0 or high < 0:
        return f"{head} The interval excludes zero: other test images would most likely agree."
    return f"{head} The interval contains zero: these images cannot tell the two apart."


def comparison_rows(aggregate: Mapping) -> list[dict]:
    """The comparisons of results.json, each with its sentence."""
    titles = {name: content["title"] for name, content in aggregate["methods"].items()}
    several = len(tables.categories(aggregate)) > 1
    return [
        {**row, "sentence": comparison_sentence(row, titles[row["a"]], titles[row["b"]], several)}
        for row in aggregate.get("comparisons") or []
    ]


def _headline(content: Mapping, name: str) -> Mapping:
    """The number to quote for a method: all images of its only category, else the summary."""
    metrics = content["metrics"]
    if len(metrics) == 1:
        return tables.entry(next(iter(metrics.values())), "all", name)
    seeds = {r["seed"]: None for r in content.get("runs") or []}
    return {**((content.get("summary") or {}).get(name) or {}), "seeds": seeds}


def _why(content: Mapping) -> str:
    """The reason of a missing image AUROC, as the end of a sentence."""
    reasons = [(m.get("all") or {}).get("reasons") or {} for m in content["metrics"].values()]
    known = [r["image_auroc"] for r in reasons if r.get("image_auroc")]
    return f" ({known[0]})" if known else ""


def _weakest(metrics: Mapping, summary: Mapping, reference: str | None) -> list[str]:
    """The category or domain of the lowest image AUROC, and its loss against the reference."""
    if len(metrics) > 1:
        worst = (summary.get("image_auroc") or {}).get("worst") or {}
        if not tables.is_number(worst.get("value")):
            return []
        low = tables.percent(worst["value"])
        return [f"It is weakest on {worst.get('where')} ({low} % image AUROC)."]
    only = next(iter(metrics.values()), {})
    domains = [d for d in tables.ordered_domains(only, reference) if d != "all"]
    means = {d: tables.entry(only, d, "image_auroc").get("mean") for d in domains}
    means = {d: mean for d, mean in means.items() if tables.is_number(mean)}
    if len(means) < 2:
        return []
    low = min(means, key=means.get)
    text = f"It is weakest in the domain “{low}” ({tables.percent(means[low])} % image AUROC"
    if reference in means and low != reference:
        text += f", {tables.percent(means[reference] - means[low])} points below “{reference}”"
    return [text + ")."]


def _with_std(number: Mapping) -> str:
    """`82.1` or, over several seeds, `82.1 ± 0.6`."""
    spread = tables.spread(number)
    return tables.percent(number["mean"]) + (f" ± {spread}" if spread else "")


def _points(value: float, short: bool = False) -> str:
    """`5.1 points above` or `below`; short form `5.1 above`."""
    unit = "" if short else " points"
    return f"{tables.percent(abs(value))}{unit} {'below' if value < 0 else 'above'}"

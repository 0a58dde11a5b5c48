"""The report's numbers as sentences for someone who reads nothing else: plain text, no HTML.

Reads the aggregate results.json (see evaluate.py) as nested dicts. The wording is careful where the
numbers are: a difference whose interval contains zero is not called one. Called by report.py.
"""

import math
from collections.abc import Mapping

import numpy as np

from mmrjax.report import tables

# What the published tables of a method were made with: {fact: start of the weights file's name}.
PAPER_WEIGHTS = {"teacher": "wide_resnet50_2-95faca4d", "student": "mae_visualize_vit_base"}

FALSE_ALARMS = 0.05  # share of good images that the headline sentence lets be rejected


def detection_rate(scores: np.ndarray, is_anomaly: np.ndarray) -> float | None:
    """Share of defective images above all but 5 % of the good ones.

    It is read off the test scores and only describes them; no threshold is taken from it.

    Returns:
        A fraction, or None with fewer than 20 good images or no defective one.
    """
    good, bad = np.sort(scores[~is_anomaly])[::-1], scores[is_anomaly]
    if good.size < 1 / FALSE_ALARMS or not bad.size:
        return None
    cut = good[math.floor(FALSE_ALARMS * good.size + 1e-9)]
    return float(np.mean(bad > cut))


def headline_cell(aggregate: Mapping, method: str) -> tables.Cell:
    """The one number of a method: image AUROC of its only category, else the mean over all."""
    one = _headline(aggregate["methods"][method], "image_auroc")
    several = len(one.get("seeds") or {}) > 1 and tables.is_number(one.get("std"))
    return tables.Cell(
        tables.percent(one.get("mean")), tables.percent(one["std"]) if several else ""
    )


def answer(aggregate: Mapping, method: str, found: float | None) -> list[str]:
    """What a method achieves, as sentences for someone who reads nothing else.

    Args:
        aggregate: results.json of the work directory.
        method: its key there.
        found: `detection_rate`, mean over runs; None leaves that sentence out.
    """
    content, title = aggregate["methods"][method], tables.method_title(method)
    metrics, keys = content["metrics"], list(content["metrics"])
    several = len(keys) > 1
    main = _headline(content, "image_auroc")
    sentences = []
    if found is not None:
        sentences.append(
            f"{title} finds {tables.percent(found)} % of the defective images when "
            f"{100 * FALSE_ALARMS:.0f} % of the good ones may be rejected by mistake."
        )
    if tables.is_number(main.get("mean")):
        who = "It" if found is not None else title
        seeds = len(main.get("seeds") or {})
        details = ["image AUROC"]
        details += [f"mean over {len(keys)} categories"] if several else []
        details += [f"mean ± std over {seeds} seeds"] if seeds > 1 else []
        details += (
            [f"95 % interval {tables.interval(main['ci95'])} %"]
            if tables.interval(main.get("ci95"))
            else []
        )
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
    """How a run's numbers came about, as {term: text}: mode, truth, weights and versions.

    Args:
        facts: of the run's results.json.
    """
    truth = facts.get("ground_truth") or {}
    terms = {"metric mode": "metrics_mode", "masks": "masks", "labels": "labels"}
    lines = {term: str(truth[name]) for term, name in terms.items() if name in truth}
    lines["evaluated"] = "the weights of the last epoch; no score chose them"
    for role in PAPER_WEIGHTS:
        one = facts.get(role) or {}
        if one:
            digest = f", sha256 {one['sha256']}" if one.get("sha256") else ""
            what = one.get("name") or ""
            lines[role] = f"{what} {_source(one)}".strip() + digest
    if facts.get("versions"):
        lines["versions"] = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    return lines


def departures(facts: Mapping) -> list[str]:
    """What keeps a run's numbers from being the paper's: weights that are random or others."""
    found = []
    for role, wanted in PAPER_WEIGHTS.items():
        one = facts.get(role) or {}
        # A file of `mmrjax.convert` holds the same weights as the one it was converted from.
        original = one.get("converted_from") or one
        published = str(original.get("source") or "").startswith(wanted)
        # The publisher's hash, where the name carries one: a renamed file is not the paper's.
        _, _, digits = wanted.partition("-")
        if one and not (published and str(original.get("sha256") or "").startswith(digits)):
            kind = "random weights" if _is_random(one) else "weights other than the paper's"
            name = f" {one['name']}" if one.get("name") else ""
            found.append(f"the {role}{name} has {kind} ({_source(one)}; paper: {wanted})")
    return found


def _is_random(weights: Mapping) -> bool:
    return weights.get("random") is True or weights.get("init") == "scratch"


def _source(weights: Mapping) -> str:
    """Where weights are from: a file's name, the one it was converted from, or what drew them."""
    name = str(weights.get("source") or weights.get("init") or "of unknown origin")
    original = weights.get("converted_from")
    return f"{name} (converted from {original['source']})" if original else name


def comparison_sentence(one: Mapping, several_keys: bool) -> str:
    """A paired comparison in words, honest about what the interval allows to say."""
    a, b = tables.method_title(one["a"]), tables.method_title(one["b"])
    name = tables.metric(one["metric"]).title
    head = f"{name} on {one['key']}: " if several_keys else f"{name}: "
    difference, ci95 = one.get("difference"), one.get("ci95")
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
    comparisons = aggregate.get("comparisons") or []
    several = len(tables.categories(aggregate)) > 1
    return [{**one, "sentence": comparison_sentence(one, several)} for one in comparisons]


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
    found = [r["image_auroc"] for r in reasons if r.get("image_auroc")]
    return f" ({found[0]})" if found else ""


def _weakest(metrics: Mapping, summary: Mapping, reference: str | None) -> list[str]:
    """Where a method is weakest, and what that costs against the reference domain."""
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


def _with_std(one: Mapping) -> str:
    """`82.1` or, over several seeds, `82.1 ± 0.6`."""
    several = len(one.get("seeds") or {}) > 1 and tables.is_number(one.get("std"))
    return tables.percent(one["mean"]) + (f" ± {tables.percent(one['std'])}" if several else "")


def _points(value: float, short: bool = False) -> str:
    """`5.1 points above` or `below`; short form `5.1 above`."""
    unit = "" if short else " points"
    return f"{tables.percent(abs(value))}{unit} {'below' if value < 0 else 'above'}"

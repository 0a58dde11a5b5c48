"""The report's tables: metrics by method, category and domain, as rows of formatted cells.

`aggregate` is results.json of a work directory as `files.read_workdir` returns it: nested dicts.
Fractions 0..1 become percent with one decimal; a missing value becomes a dash with the reason in a
footnote. The rows hold no HTML: the templates of report.html and report.md show the same rows.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

DASH = "–"
NOT_METRICS = ("counts", "reasons", "ci95", "error_at_most", "defects")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric's full title, its place in a table, and its meaning."""

    title: str
    group: str
    column: str
    meaning: str


METRICS = {
    "image_auroc": Metric(
        "Image AUROC",
        "Whole image",
        "AUROC",
        "The chance that a defective image scores higher than a good one; guessing gives 50 %.",
    ),
    "image_ap": Metric(
        "Image AP",
        "Whole image",
        "AP",
        "Average precision: how pure the list of images is when read from the highest "
        "score down; guessing gives the share of defective images.",
    ),
    "image_f1_max": Metric(
        "Image F1 max",
        "Whole image",
        "F1 max",
        "The best balance of missed defects and false alarms that any one threshold reaches.",
    ),
    "pixel_auroc": Metric(
        "Pixel AUROC",
        "Pixels",
        "AUROC",
        "The chance that a defective pixel is hotter than a good one; large defects dominate it.",
    ),
    "pixel_ap": Metric(
        "Pixel AP",
        "Pixels",
        "AP",
        "Average precision over pixels; guessing gives the share of defective pixels.",
    ),
    "pixel_f1_max": Metric(
        "Pixel F1 max",
        "Pixels",
        "F1 max",
        "The best overlap of map and truth that any one threshold reaches.",
    ),
    "aupro_0.3": Metric(
        "AUPRO",
        "Regions",
        "AUPRO",
        "Share of each defect region that is covered, averaged over regions and over "
        "false-positive rates up to 0.3 (the definition of MVTec AD).",
    ),
    "pro_mmr": Metric(
        "PRO (MMR)",
        "Regions",
        "PRO (MMR)",
        "The per-image variant in the tables of the MMR paper; not comparable with AUPRO.",
    ),
    "tiny_recall": Metric(
        "Tiny defects found",
        "Regions",
        "tiny found",
        "Share of the defect regions under 10 px (eval.tiny_side) that have a pixel hotter than "
        "the hottest one of all but 5 % of the good images.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number of a table: percent, spread and interval, or the reason why it is missing."""

    text: str
    std: str = ""
    interval: str = ""
    where: str = ""
    note: int = 0  # number of the footnote, 0 for none
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table; `css` is all, domain, category, mean, worst, gap or seed."""

    label: str
    css: str
    cells: list[Cell]
    counts: Mapping | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of one method, and its summary rows."""

    title: str
    rows: list[Row]
    summary: list[Row]


class Footnotes:
    """Numbers the reasons of missing values in the order in which they first appear."""

    def __init__(self):
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        """Number of a footnote, from 1."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def metric(name: str) -> Metric:
    """A metric's texts; an unknown metric goes by its own name."""
    return METRICS.get(name, Metric(name, "", name, ""))


def domain_title(name: str) -> str:
    """A domain as a table names it."""
    return {"all": "all images", "": "no domain"}.get(name, name)


def short_key(key: str) -> str:
    """The category of "<dataset>/<category>"."""
    return key.rpartition("/")[2]


def is_number(value: object) -> bool:
    """True for a finite int or float."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value)


def percent(value: object) -> str:
    """A fraction as percent with one decimal and a true minus sign; a dash when there is none."""
    if not is_number(value):
        return DASH
    text = f"{100 * value:.1f}"
    return text.replace("-", "" if text == "-0.0" else "\N{MINUS SIGN}")


def interval(ci95: object) -> str:
    """A 95 % interval as `79.0–85.2`, or nothing."""
    if not isinstance(ci95, (list, tuple)) or len(ci95) != 2 or not all(map(is_number, ci95)):
        return ""
    return f"{percent(ci95[0])}{DASH}{percent(ci95[1])}"


def spread(number: Mapping) -> str:
    """The standard deviation over several seeds, or nothing."""
    several = len(number.get("seeds") or {}) > 1 and is_number(number.get("std"))
    return percent(number["std"]) if several else ""


def entry(metrics: Mapping, domain: str, name: str) -> Mapping:
    """{"mean", "std", "ci95", "seeds"} of one number; empty if it was not measured."""
    return (metrics.get(domain) or {}).get(name) or {}


def metric_names(aggregate: Mapping) -> list[str]:
    """The metrics of the tables: those of METRICS in its order, then any others in the file."""
    names = {name for *_, values in _values(aggregate) for name in values}
    extra = sorted(names - set(METRICS) - set(NOT_METRICS))
    return [name for name in METRICS if name in names] + extra


def categories(aggregate: Mapping) -> list[str]:
    """All "<dataset>/<category>" keys in the order of the file."""
    return list(dict.fromkeys(key for _, key, _, _ in _values(aggregate)))


def ordered_domains(metrics: Mapping, reference: str | None) -> list[str]:
    """`all` first, then the reference domain, then the others; a lone unnamed domain is dropped."""
    others = [domain for domain in metrics if domain not in ("all", reference)]
    if others == [""] and "all" in metrics:
        others = []
    return [d for d in ("all", reference) if d is not None and d in metrics] + others


def metric_tables(aggregate: Mapping, footnotes: Footnotes) -> list[Table]:
    """The main table, one block per method."""
    names, keys = metric_names(aggregate), categories(aggregate)
    tables = []
    for content in aggregate["methods"].values():
        rows = []
        for key in (key for key in keys if key in content["metrics"]):
            metrics = content["metrics"][key]
            domains = ordered_domains(metrics, aggregate.get("reference_domain"))
            for domain in domains:
                label, css = domain_title(domain), "all" if domain == "all" else "domain"
                if len(keys) > 1 and domain == domains[0]:
                    label = short_key(key) if domain == "all" else f"{short_key(key)}, {label}"
                if len(domains) == 1:
                    css = "category"
                values = metrics[domain] or {}
                cells = [cell(values, name, footnotes) for name in names]
                rows.append(Row(label, css, cells, values.get("counts") or {}))
        summary = _summary_rows(content.get("summary") or {}, names, aggregate)
        tables.append(Table(content["title"], rows, summary))
    return tables


def seed_table(aggregate: Mapping) -> list[Row]:
    """Every seed's own numbers; empty if no method has more than one seed."""
    names, rows = metric_names(aggregate), []
    for method, key, domain, values in _values(aggregate):
        seeds = dict.fromkeys(
            s for name in names for s in (values.get(name) or {}).get("seeds") or {}
        )
        if len(seeds) > 1:
            title = aggregate["methods"][method]["title"]
            where = f"{title}, {short_key(key)}, {domain_title(domain)}"
            for seed in seeds:
                numbers = [((values.get(n) or {}).get("seeds") or {}).get(seed) for n in names]
                cells = [Cell(percent(number)) for number in numbers]
                rows.append(Row(f"{where}, seed {seed}", "seed", cells))
    return rows


def shift_costs(aggregate: Mapping) -> list[Table]:
    """Per method and domain: its mean minus the reference domain's, in points, over categories."""
    reference, names = aggregate.get("reference_domain"), metric_names(aggregate)
    tables = []
    for content in aggregate["methods"].values():
        rows = []
        shared = [m for m in content["metrics"].values() if reference in m]
        domains = dict.fromkeys(d for m in shared for d in ordered_domains(m, reference))
        for domain in (d for d in domains if d not in ("all", reference)):
            cells = []
            for name in names:
                pairs = [(entry(m, domain, name), entry(m, reference, name)) for m in shared]
                pairs = [(a.get("mean"), b.get("mean")) for a, b in pairs]
                costs = [a - b for a, b in pairs if is_number(a) and is_number(b)]
                cells.append(Cell(_signed(float(np.mean(costs))) if costs else DASH))
            rows.append(Row(domain_title(domain), "domain", cells))
        if rows:
            tables.append(Table(content["title"], rows, []))
    return tables


def aligned(rows: list[list[str]]) -> str:
    """Rows of equally many cells as plain text, columns lined up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _values(aggregate: Mapping) -> Iterator[tuple[str, str, str, Mapping]]:
    """(method, key, domain, values) of every domain in results.json."""
    for method, content in aggregate["methods"].items():
        for key, metrics in content["metrics"].items():
            for domain in ordered_domains(metrics, aggregate.get("reference_domain")):
                yield method, key, domain, metrics[domain] or {}


def cell(values: Mapping, name: str, footnotes: Footnotes) -> Cell:
    """One measured number, or a dash with its footnote."""
    number = values.get(name) or {}
    if not is_number(number.get("mean")):
        reason = (values.get("reasons") or {}).get(name) or "not measured in this run"
        return Cell(DASH, note=footnotes.number(reason), reason=reason)
    return Cell(percent(number["mean"]), spread(number), interval(number.get("ci95")))


def _summary_rows(summary: Mapping, names: list[str], aggregate: Mapping) -> list[Row]:
    """Mean, worst and gap to the reference domain, as far as the file has them."""
    numbers = [summary.get(name) or {} for name in names]
    worst = [number.get("worst") or {} for number in numbers]
    several = any(
        len(e.get("seeds") or {}) > 1 for *_, v in _values(aggregate) for e in _entries(v)
    )
    stds = [percent(n["std"]) if several and is_number(n.get("std")) else "" for n in numbers]
    means = [Cell(percent(n.get("mean")), std) for n, std in zip(numbers, stds, strict=True)]
    has_domains = any(domain != "all" for _, _, domain, _ in _values(aggregate))
    over = ["domains"] if has_domains else []
    over += ["categories"] if len(categories(aggregate)) > 1 or not over else []
    rows = [Row(f"mean over {' and '.join(over)}", "mean", means)]
    apart = [number.get("datasets") or {} for number in numbers]
    for dataset in dict.fromkeys(name for own in apart for name in own):
        own_means = [Cell(percent(own.get(dataset))) for own in apart]
        rows.append(Row(f"mean of {dataset}", "mean", own_means))
    common = _common_folder([str(w.get("where") or "") for w in worst])
    places = [str(w.get("where") or "")[len(common) :] for w in worst]
    cells = [
        Cell(percent(w.get("value")), where=place) for w, place in zip(worst, places, strict=True)
    ]
    rows.append(Row("worst", "worst", cells))
    gaps = [number.get("gap_to_reference") for number in numbers]
    if any(is_number(gap) for gap in gaps):
        cells = [Cell(_signed(gap) if is_number(gap) else DASH) for gap in gaps]
        rows.append(Row(f"gap to “{aggregate.get('reference_domain')}”, points", "gap", cells))
    return rows if summary else []


def _common_folder(paths: list[str]) -> str:
    """The folders that all non-empty paths share: "set/tile/" of set/tile/a and set/tile/b."""
    folders = [path.split("/")[:-1] for path in paths if path]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "".join(f"{parts[0]}/" for parts in shared)


def _entries(values: Mapping) -> list[Mapping]:
    """The metric entries among a domain's values."""
    return [v for k, v in values.items() if k not in NOT_METRICS and isinstance(v, Mapping)]


def _signed(value: float) -> str:
    """A difference in points with its sign; zero has none."""
    text = percent(value)
    return text if value < 0 or text == "0.0" else f"+{text}"

"""The report's tables of what is missed: by kind of defect, and by defect and condition.

Reads the aggregate results.json (see evaluate.py and metrics/misses.py). As in report_tables.py,
rows of formatted cells, no HTML.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mmrjax.report import tables as report_tables
from mmrjax.report.tables import Cell

NAMES = ("image_auroc", "missed_at_5", "missed_at_1")
COLUMNS = ("Image AUROC", "missed at 5 %", "missed at 1 %")
EXPLANATION = (
    "Missed: share of defective images that score no higher than a threshold with 5 % or 1 % of "
    "the good test images above it, those of the same data set (and condition). The threshold only "
    "describes this test."
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of one method: `heads` over the texts of a row, then COLUMNS over its numbers."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[list[str], list[Cell]]]


def by_defect(aggregate: Mapping, footnotes: report_tables.Footnotes) -> list[Table]:
    """Per method: every kind of defect, over all images; of joined data sets, in each of them."""
    tables = []
    for method, content in aggregate["methods"].items():
        rows, several = [], len(content["metrics"]) > 1
        for key, domains in content["metrics"].items():
            places = [name for name in domains if name != "all"]
            joined = bool(content.get("combinations")) and len(places) > 1
            for place in places if joined else ["all"]:
                where = place if joined else report_tables.short_key(key) if several else ""
                kinds = (domains.get(place) or {}).get("defects") or {}
                for kind, entry in kinds.items():
                    label = f"{where}, {kind}" if where else kind
                    rows.append(([label, _images(entry)], _cells(entry, footnotes)))
        if rows:
            title = report_tables.method_title(method)
            tables.append(Table(title, ("defect", "images (groups)"), rows))
    return tables


def combinations(aggregate: Mapping, footnotes: report_tables.Footnotes) -> list[Table]:
    """Per method: every defect under every condition, and the means of those that trained or not.

    Empty but for the cross-domain tracks.
    """
    tables, heads = [], ("data set", "condition", "defect", "good / defective", "combination")
    for method, content in aggregate["methods"].items():
        entries = content.get("combinations") or []
        rows = []
        for one in entries:
            counts = f"{one['good']} / {_images(one)}"
            texts = [one["part"], one["condition"], one["defect"], counts, _trained(one["unseen"])]
            rows.append((texts, _cells(one, footnotes)))
        if any(one["unseen"] for one in entries):
            for unseen in (False, True):
                means = [_mean(entries, unseen, name) for name in NAMES]
                rows.append((["mean", "", "", "", _trained(unseen)], means))
        if rows:
            tables.append(Table(report_tables.method_title(method), heads, rows))
    return tables


def _trained(unseen: bool) -> str:
    return "kept out" if unseen else "not kept out"


def _images(entry: Mapping) -> str:
    return f"{entry['images']} ({entry['groups']})"


def _cells(entry: Mapping, footnotes: report_tables.Footnotes) -> list[Cell]:
    return [report_tables.cell(entry, name, footnotes) for name in NAMES]


def _mean(entries: list[Mapping], unseen: bool, name: str) -> Cell:
    values = [one[name]["mean"] for one in entries if one["unseen"] == unseen]
    defined = [value for value in values if report_tables.is_number(value)]
    return Cell(report_tables.percent(float(np.mean(defined)) if defined else None))

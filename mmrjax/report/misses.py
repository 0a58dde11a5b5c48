"""The report's tables of missed defects: by kind of defect, and by defect and condition.

The numbers are those of metrics/misses.py. As in tables.py, the result is rows of formatted cells
without HTML.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mmrjax.report import tables as tables_lib
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


def by_defect(aggregate: Mapping, footnotes: tables_lib.Footnotes) -> list[Table]:
    """Per method: every kind of defect over all images, or in each of the joined data sets."""
    tables = []
    for content in aggregate["methods"].values():
        rows, several = [], len(content["metrics"]) > 1
        for key, domains in content["metrics"].items():
            places = [name for name in domains if name != "all"]
            joined = bool(content.get("combinations")) and len(places) > 1
            for place in places if joined else ["all"]:
                where = place if joined else tables_lib.short_key(key) if several else ""
                kinds = (domains.get(place) or {}).get("defects") or {}
                for kind, entry in kinds.items():
                    label = f"{where}, {kind}" if where else kind
                    rows.append(([label, _images(entry)], _cells(entry, footnotes)))
        if rows:
            tables.append(Table(content["title"], ("defect", "images (groups)"), rows))
    return tables


def combinations(aggregate: Mapping, footnotes: tables_lib.Footnotes) -> list[Table]:
    """Per method: every defect under every condition, and the means with and without training.

    Empty but for the cross-domain tracks.
    """
    tables, heads = [], ("data set", "condition", "defect", "good / defective", "combination")
    for content in aggregate["methods"].values():
        entries = content.get("combinations") or []
        rows = []
        for entry in entries:
            place = [entry[name] for name in ("part", "condition", "defect")]
            counts = f"{entry['good']} / {_images(entry)}"
            texts = [*place, counts, _trained(entry["unseen"])]
            rows.append((texts, _cells(entry, footnotes)))
        if any(entry["unseen"] for entry in entries):
            for unseen in (False, True):
                means = [_mean(entries, unseen, name) for name in NAMES]
                rows.append((["mean", "", "", "", _trained(unseen)], means))
        if rows:
            tables.append(Table(content["title"], heads, rows))
    return tables


def _trained(unseen: bool) -> str:
    return "kept out" if unseen else "not kept out"


def _images(entry: Mapping) -> str:
    return f"{entry['images']} ({entry['groups']})"


def _cells(entry: Mapping, footnotes: tables_lib.Footnotes) -> list[Cell]:
    return [tables_lib.cell(entry, name, footnotes) for name in NAMES]


def _mean(entries: list[Mapping], unseen: bool, name: str) -> Cell:
    values = [entry[name]["mean"] for entry in entries if entry["unseen"] == unseen]
    defined = [value for value in values if tables_lib.is_number(value)]
    return Cell(tables_lib.percent(float(np.mean(defined)) if defined else None))

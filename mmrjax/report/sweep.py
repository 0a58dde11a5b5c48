"""The comparison table of a sweep, for the page and for the terminal.

Each row stands beside the paper's numbers. A table that was judged without the test is ranked
instead, by the mean of its metrics. The content is that of results.json, which runs/sweep.py
writes. report/page.py renders the page; main.py prints the table.
"""

from collections.abc import Iterable, Mapping, Sequence

from mmrjax.report import charts, files, tables

AVERAGES = {
    "domains": "mean over domains, then over categories",
    "images": "all images of a category pooled",
}
NOT_RUN = "not run yet"
JUDGED = (
    "Ranked without the test: by the mean of the metrics on good training pictures that were held "
    "out and on copies of them with drawn defects, of kinds that training does not use"
)


def page(content: Mapping, about: Mapping[str, files.MethodInfo]) -> dict:
    """Everything that the templates of a sweep show."""
    rows = _rows(content, about)
    titles = [tables.metric(name).title for name in content["metrics"]]
    return {
        "title": content["title"],
        "judged": JUDGED if _is_judged(content) else "",
        "source": content["source"],
        "average": AVERAGES[content["average"]],
        "columns": _heads(content, titles),
        "with_paper": _with_paper(content),
        "rows": rows,
        "protocol": _common(row["protocol"] for row in rows if row["protocol"]),
        "departures": _departures(rows),
        "chart": _chart(content, titles[0]),
    }


def text_table(content: Mapping, about: Mapping[str, files.MethodInfo]) -> str:
    """The table as plain text, in percent."""
    with_paper = _with_paper(content)
    head = ["row"]
    for name in _heads(content, content["metrics"]):
        head += [name, "paper"] if with_paper else [name]
    lines = [head]
    for row in _rows(content, about):
        cells = [(ours, paper) if with_paper else (ours,) for ours, paper in row["cells"]]
        lines.append([row["label"], *(text for pair in cells for text in pair)])
    return tables.aligned(lines)


def _is_judged(content: Mapping) -> bool:
    return "judge" in content


def _with_paper(content: Mapping) -> bool:
    return any(row["paper"] for row in content["rows"])


def _heads(content: Mapping, names: Iterable[str]) -> list[str]:
    """The heads of the columns of numbers: a judged table begins with the mean that ranks it."""
    return ["mean", *names] if _is_judged(content) else [*names]


def _rows(content: Mapping, about: Mapping[str, files.MethodInfo]) -> list[dict]:
    """One line per row and method; a row that has not run yet has one line.

    The lines of a judged table are ranked: an undefined metric and a row without a run come last.
    """
    lines = _lines(content, about)
    if not _is_judged(content):
        return lines
    for line in lines:
        mean, ran = line["mean"], bool(line["seeds"])
        line["cells"].insert(0, (tables.percent(mean) if ran else NOT_RUN, ""))
    return sorted(lines, key=lambda line: (line["mean"] is None, -(line["mean"] or 0.0)))


def _lines(content: Mapping, about: Mapping[str, files.MethodInfo]) -> list[dict]:
    lines = []
    several = any(len(row["methods"]) > 1 for row in content["rows"])
    for row in content["rows"]:
        for method, measured in row["methods"].items() or [("", {})]:
            name = about[method].title if method in about else method
            values = measured.get("metrics", {})
            lines.append(
                {
                    "label": f"{row['label']}, {name}" if several and name else row["label"],
                    "overrides": row["overrides"],
                    "report": row["report"],
                    "cells": [
                        (_ours(values.get(metric)), _paper(row["paper"], metric))
                        for metric in content["metrics"]
                    ],
                    "mean": _mean([values.get(metric) for metric in content["metrics"]]),
                    "seeds": measured.get("seeds", []),
                    "protocol": measured.get("protocol", {}),
                    "departures": measured.get("departures", []),
                }
            )
    return lines


def _mean(values: Sequence[Mapping | None]) -> float | None:
    """The mean of several metrics; None if one of them is undefined."""
    means = [value["mean"] if value else None for value in values]
    return sum(means) / len(means) if all(map(tables.is_number, means)) else None


def _common(protocols: Iterable[Mapping]) -> dict[str, str]:
    """The terms of a protocol, each with its text, or with the texts of the different rows."""
    texts: dict[str, dict[str, None]] = {}
    for protocol in protocols:
        for term, text in protocol.items():
            texts.setdefault(term, {})[text] = None
    return {term: "; or ".join(different) for term, different in texts.items()}


def _departures(rows: Iterable[Mapping]) -> list[tuple[str, str]]:
    """(a departure from the paper, the labels of the rows that depart) of each departure."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        for text in row["departures"]:
            labels.setdefault(text, []).append(row["label"])
    return [(text, "; ".join(rows_of_text)) for text, rows_of_text in labels.items()]


def _ours(value: Mapping | None) -> str:
    """`84.7 ± 0.5`; ± is the standard deviation over seeds."""
    if value is None:
        return NOT_RUN
    text = tables.percent(value["mean"])
    spread = tables.is_number(value["std"])
    return f"{text} ± {tables.percent(value['std'])}" if spread else text


def _paper(paper: Mapping | str, metric: str) -> str:
    return paper if isinstance(paper, str) else tables.percent(paper[metric])


def _chart(content: Mapping, title: str) -> str | None:
    """The first metric per row: ours with its standard deviation, the paper's below it."""
    metric, rows = content["metrics"][0], []
    for row in content["rows"]:
        dots = []
        for measured in row["methods"].values():
            mean, std = (measured["metrics"][metric][part] for part in ("mean", "std"))
            if tables.is_number(mean):
                ends = (None, None) if std is None else (100 * (mean - std), 100 * (mean + std))
                dots.append(charts.Interval(100 * mean, *ends, charts.method_class(0)))
        if dots and not isinstance(row["paper"], str):
            value = 100 * row["paper"][metric]
            dots.append(charts.Interval(value, None, None, charts.method_class(1)))
        if dots:
            rows.append((row["label"], dots))
    if len(rows) < 2:
        return None
    return charts.interval_chart(rows, f"{title} per row", f"{title} in %, ± std over seeds")

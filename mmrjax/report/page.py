"""report.md and report.html of a work directory, from the files that its runs wrote.

report.html is one self-contained page: pictures are data URIs, charts are inline SVG. A content
security policy forbids every request and every script but templates/report.js, by its hash.

`page` joins files (files.py), numbers (tables.py, misses.py, threshold.py), sentences (words.py)
and drawings (charts.py) to the dict that both templates see. A run that lacks a file is reported
without the part that needs the file, and the report says so.
"""

import base64
import hashlib
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe
import numpy as np

from mmrjax.report import charts, misses, sweep, tables, words
from mmrjax.report import files as report_files
from mmrjax.report import threshold as threshold_lib
from mmrjax.runtime import files

CATEGORY_BYTES = 2_400_000  # all embedded pictures of one category, as base64
PAGE_BYTES = 24_000_000  # and of all categories together
PRO_LIMIT = 0.3  # the PRO curve is integrated up to this false-positive rate
FACTS_ELSEWHERE = ("seconds", "notes", "command")  # facts that the page shows in other places
KIND_TITLES = {
    "best": ("Clear cases", "Defects scored highest and good parts scored lowest."),
    "worst": ("Worst cases", "Defects scored lowest and good parts scored highest."),
    "borderline": ("Borderline", "Nearest to the score where good and defective images cross."),
}


def write_report(
    workdir: str | pathlib.Path, about: Mapping[str, report_files.MethodInfo]
) -> pathlib.Path:
    """Renders report.md and report.html into a work directory.

    Args:
        workdir: holds results.json and the runs that it lists.
        about: {name of a method: its title and its paper's weights}, such as METHODS; a method that
            is absent goes by its name and has no weights to depart from.

    Returns:
        Path of report.html.

    Raises:
        FileNotFoundError: there is no results.json.
        ValueError: results.json cannot be read.
    """
    workdir = pathlib.Path(workdir)
    aggregate, runs = report_files.read_workdir(workdir, about)
    is_sweep = "rows" in aggregate
    content = sweep.page(aggregate, about) if is_sweep else page(aggregate, runs)
    for name, escape in (("report.md", False), ("report.html", True)):
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("mmrjax.report"),
            autoescape=escape,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters |= {"percent": tables.percent, "md": _markdown, "fact": _fact}
        template = name.replace("report", "sweep") if is_sweep else name
        text = environment.get_template(f"{template}.j2").render(content)
        files.write_text(workdir / name, text)
    return workdir / "report.html"


def page(aggregate: dict, runs: Sequence[report_files.Run]) -> dict:
    """Everything the templates show; arguments as `files.read_workdir` returns them."""
    footnotes = tables.Footnotes()
    keys = tables.categories(aggregate)
    methods = _methods(aggregate, runs)
    facts = [method["facts"] for method in methods]
    columns = [tables.metric(name) for name in tables.metric_names(aggregate)]
    groups = [column.group for column in columns]
    script = (pathlib.Path(__file__).parent / "templates" / "report.js").read_text("utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return {
        "aggregate": aggregate,
        "script": markupsafe.Markup(script),  # the only script that the page lets run
        "script_hash": base64.b64encode(digest).decode(),
        "title": aggregate.get("title") or aggregate.get("dataset") or "mmrjax",
        "seeds": sorted({run.seed for run in runs}),
        "keys": keys,
        "methods": methods,
        "random_teacher": [fact["title"] for fact in facts if fact["random"]],
        "notes": _notes(aggregate, runs),
        "columns": columns,
        "column_groups": [(name, len(list(some))) for name, some in itertools.groupby(groups)],
        "method_legend": [(m["title"], m["css"]) for m in methods],
        "teachers": _teachers(facts),
        "tables": tables.metric_tables(aggregate, footnotes),
        "by_defect": misses.by_defect(aggregate, footnotes),
        "combinations": misses.combinations(aggregate, footnotes),
        "footnotes": footnotes.texts,
        "costs": tables.shift_costs(aggregate),
        "missed_columns": misses.COLUMNS,
        "missed_explanation": misses.EXPLANATION,
        "seed_rows": tables.seed_table(aggregate),
        "comparisons": words.comparison_rows(aggregate),
        "overviews": _overviews(aggregate),
        "categories": [
            {**_category(key, runs, len(keys)), "results": _results(aggregate, key)} for key in keys
        ],
        # After the categories: a damaged picture shows itself when it is embedded.
        "missing": [f"{run.path}: {text}" for run in runs for text in run.missing],
    }


def _methods(aggregate: Mapping, runs: Sequence[report_files.Run]) -> list[dict]:
    """Title, headline, sentences and facts of each method."""
    methods = []
    for index, (name, content) in enumerate(aggregate["methods"].items()):
        own = [run for run in runs if run.method == name]
        methods.append(
            {
                "title": content["title"],
                "css": charts.method_class(index),
                "headline": words.headline_cell(content),
                "sentences": words.answer(aggregate, name, _detection_rate(own)),
                "facts": _facts(content, own),
            }
        )
    return methods


def _detection_rate(runs: Sequence[report_files.Run]) -> float | None:
    """Mean over a method's runs of `words.detection_rate`; None unless all runs have a rate."""
    rates = []
    for run in runs:
        scores = run.scores.get("score", np.empty(0))
        is_anomaly = run.scores.get("label", np.empty(0, str)) == "anomaly"
        rates.append(words.detection_rate(scores, is_anomaly))
    return float(np.mean(rates)) if rates and None not in rates else None


def _facts(content: Mapping, runs: Sequence[report_files.Run]) -> dict:
    """Facts of a method: those of its first run, the seconds of all."""
    facts = [run.results.get("facts") or {} for run in runs]
    first = dict(next(iter(facts), {}))
    seconds = [(run, fact.get("seconds") or {}) for run, fact in zip(runs, facts, strict=True)]
    return {
        "title": content["title"],
        "random": any((fact.get("teacher") or {}).get("random") is True for fact in facts),
        "teacher": first.get("teacher") or {},
        "protocol": words.protocol(first),
        "departures": words.departures(first, content["paper_weights"]),
        "shown": {k: v for k, v in first.items() if k not in FACTS_ELSEWHERE and v != {}},
        "command": str(first.get("command") or ""),
        "phases": list(dict.fromkeys(phase for _, phases in seconds for phase in phases)),
        "seconds": seconds,
        "config": json.dumps(runs[0].config, indent=2) if runs and runs[0].config else "",
    }


def _teachers(facts: Sequence[Mapping]) -> list[tuple[str, str]]:
    """Each teacher with the methods that used it."""
    titles: dict[str, list[str]] = {}
    for fact in facts:
        teacher = fact["teacher"]
        if teacher:
            source = "random weights" if teacher.get("random") else teacher.get("source")
            name = f"{teacher.get('name')}" + (f" ({source})" if source else "")
            titles.setdefault(name, []).append(fact["title"])
    return [(name, ", ".join(some)) for name, some in titles.items()]


def _notes(aggregate: Mapping, runs: Sequence[report_files.Run]) -> list[str]:
    """Every note of methods and runs once, after the titles of the methods that carry it."""
    carriers: dict[str, list[str]] = {}
    of_methods = [(m["title"], m.get("notes")) for m in aggregate["methods"].values()]
    of_runs = [(run.title, (run.results.get("facts") or {}).get("notes")) for run in runs]
    for title, notes in of_methods + of_runs:
        for note in notes or []:
            titles = carriers.setdefault(str(note), [])
            titles.extend([title] if title not in titles else [])
    return [f"{', '.join(titles)}: {note}" for note, titles in carriers.items()]


def _overviews(aggregate: Mapping) -> list[dict]:
    """Interval charts per domain (one category) or per category: detection and localisation."""
    keys, out = tables.categories(aggregate), []
    reference = aggregate.get("reference_domain")
    for metric in ("image_auroc", "aupro_0.3"):
        title = tables.metric(metric).title
        places: dict[tuple[str, str], list] = {}
        for index, content in enumerate(aggregate["methods"].values()):
            for key, metrics in content["metrics"].items():
                domains = tables.ordered_domains(metrics, reference)
                for domain in domains if len(keys) == 1 else ["all"]:
                    entry = tables.entry(metrics, domain, metric)
                    if tables.is_number(entry.get("mean")):
                        ends = entry.get("ci95") or (None, None)
                        values = [None if v is None else 100 * v for v in (entry["mean"], *ends)]
                        interval = charts.Interval(*values, charts.method_class(index))
                        places.setdefault((key, domain), []).append(interval)
        rows = [
            (
                tables.domain_title(d) if len(keys) == 1 else tables.short_key(key),
                some,
            )
            for (key, d), some in places.items()
        ]
        if rows and (len(rows) > 1 or len(aggregate["methods"]) > 1):
            label = f"{title} in %, with 95 % interval"
            chance = 50 if metric == "image_auroc" else None
            out.append({"title": title, "svg": charts.interval_chart(rows, title, label, chance)})
    return out


def _category(key: str, runs: Sequence[report_files.Run], n_categories: int) -> dict:
    """Charts and gallery of one category, per method: curves of its first seed, losses of all."""
    own: dict[str, list[report_files.Run]] = {}
    for run in runs:
        if run.key == key:
            own.setdefault(run.method, []).append(run)
    firsts = [some[0] for some in own.values()]
    size, quality = report_files.picture_size(
        firsts, min(CATEGORY_BYTES, PAGE_BYTES // n_categories)
    )
    methods = []
    for some in own.values():
        first = some[0]
        methods.append(
            {
                "title": first.title,
                "seed": first.seed,
                "loss": _loss_chart(some),
                "seeds": [(f"seed {r.seed}", charts.series_class(i)) for i, r in enumerate(some)],
                **_curve_charts(first),
                "histogram": _histogram(first),
                "gallery": _gallery(first, size, quality),
                "threshold": threshold_lib.panel(first),
            }
        )
    return {"key": key, "title": tables.short_key(key), "methods": methods}


def _results(aggregate: Mapping, key: str) -> str:
    """One line per category: the image AUROC of each method."""
    parts = []
    for content in aggregate["methods"].values():
        entry = tables.entry(content["metrics"].get(key) or {}, "all", "image_auroc")
        parts.append(f"{content['title']} {tables.percent(entry.get('mean'))}")
    return "image AUROC in %: " + ", ".join(parts)


def _loss_chart(runs: Sequence[report_files.Run]) -> str | None:
    """Training loss per seed, logarithmic when it falls by more than a factor of three."""
    lines = []
    for index, run in enumerate(runs):
        points = [line for line in run.log if tables.is_number(line.get("loss"))]
        unit = "epoch" if all("epoch" in p for p in points) else "step"
        by_place: dict[float, list[float]] = {}
        for point in points:
            by_place.setdefault(point.get(unit, 0), []).append(point["loss"])
        if len(by_place) < 5 and "step" in (points or [{}])[0]:
            unit, by_place = "step", {p["step"]: [p["loss"]] for p in points}
        if by_place:
            means = [float(np.mean(losses)) for losses in by_place.values()]
            css = charts.series_class(index)
            lines.append(charts.Line(f"seed {run.seed}", list(by_place), means, css))
    if not lines:
        return None
    values = [y for line in lines for y in line.y]
    log_y = min(values) > 0 and max(values) > 3 * min(values)
    label = "loss (log scale)" if log_y else "loss"
    return charts.line_chart(lines, f"{runs[0].title}: training loss", unit, label, log_y=log_y)


def _curve_charts(run: report_files.Run) -> dict:
    """ROC and PRO charts with one line per domain, and their common legend."""
    domains = [d for d in run.curves if d and d != "all"]
    domains = domains + [d for d in run.curves if d == "all"]  # drawn last: on top
    css = {d: "s-all" if d == "all" else charts.series_class(i) for i, d in enumerate(domains)}
    drawn = [d for d in domains if run.curves[d].get("roc") or run.curves[d].get("pro")]
    out = {"legend": [(tables.domain_title(d), css[d]) for d in drawn]}
    kinds = {
        "roc": ("ROC", "good images flagged", "defective images found", (0, 1), True),
        "pro": ("PRO", "good pixels flagged", "defect regions covered", (0, PRO_LIMIT), False),
    }
    for kind, (name, x_label, y_label, x_range, diagonal) in kinds.items():
        y = "tpr" if kind == "roc" else "pro"
        curves = [(d, run.curves[d][kind]) for d in domains if run.curves[d].get(kind)]
        lines = [
            charts.Line(tables.domain_title(d), c.get("fpr") or [], c.get(y) or [], css[d])
            for d, c in curves
        ]
        heading = f"{run.title}: {name} curve per domain"
        out[kind] = (
            charts.line_chart(lines, heading, x_label, y_label, x_range, (0, 1), diagonal=diagonal)
            if lines
            else None
        )
    return out


def _histogram(run: report_files.Run) -> str | None:
    """Scores of good and defective images, of all images first, then per domain."""
    if not run.scores or not np.isfinite(run.scores["score"]).any():
        return None
    finite = np.isfinite(run.scores["score"])
    scores, is_anomaly = run.scores["score"][finite], run.scores["label"][finite] == "anomaly"
    domain = run.scores["domain"][finite]
    known = [d for d in run.curves if d != "all"]
    names = dict.fromkeys([d for d in known if d in domain] + list(dict.fromkeys(domain.tolist())))
    chosen = [("all images", np.ones(scores.shape, bool))]
    if len(names) > 1:
        chosen += [(tables.domain_title(name), domain == name) for name in names]
    rows = [(label, scores[own & ~is_anomaly], scores[own & is_anomaly]) for label, own in chosen]
    return charts.histogram_chart(rows, f"{run.title}: anomaly scores per domain", "anomaly score")


def _gallery(run: report_files.Run, size: int, quality: int) -> dict | None:
    """Gallery items by kind, their pictures embedded."""
    if not run.gallery.get("items"):
        return None
    groups, threshold = [], threshold_lib.start(run)
    for kind, (title, explanation) in KIND_TITLES.items():
        items = [
            item
            | {
                "outcome": _outcome(item, threshold),
                "pictures": [
                    (
                        name,
                        caption,
                        report_files.embed_picture(run, item.get(name), size, quality),
                        report_files.picture_link(run, item, name),
                    )
                    for name, caption in (("image", "picture"), ("truth", "truth"), ("heat", "map"))
                ],
            }
            for item in run.gallery["items"]
            if item["kind"] == kind
        ]
        groups.append({"title": title, "explanation": explanation, "figures": items})
    choices = {
        "domain": sorted({item["domain"] for item in run.gallery["items"]} - {""}),
        "defect": sorted({item["defect"] for item in run.gallery["items"]} - {""}),
        "outcome": ["found", "missed", "false alarm", "passed"] if run.scores else [],
    }
    bar = charts.colour_bar(run.gallery["scale"])
    return {"bar": bar, "groups": groups, "choices": choices, "run": run.path}


def _outcome(item: Mapping, threshold: float | None) -> str:
    """The verdict on an image at the threshold, in a word or two."""
    if threshold is None:
        return ""
    outcomes = ("passed", "false alarm") if item["label"] == "good" else ("missed", "found")
    return outcomes[item["score"] > threshold]


def _markdown(text: object) -> str:
    """The text on one line, with every character escaped that Markdown or HTML would act on."""
    escaped = "".join("\\" + c if c in "\\`*_[]|~#" else c for c in str(text))
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())


def _fact(value: object) -> str:
    """A fact as text: yes or no, numbers with separated thousands, a dash for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return tables.DASH if value is None or value == "" else str(value)

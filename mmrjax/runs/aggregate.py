"""All runs of a work directory in one results.json: seeds, categories and methods side by side."""

import contextlib
import json
import math
import pathlib
from collections import defaultdict

import numpy as np

from mmrjax import metrics
from mmrjax.evaluate import results as evaluate
from mmrjax.runs import paired
from mmrjax.runtime import files


def aggregate(root: pathlib.Path, title: str, reference_domain: str) -> dict:
    """Collects `<root>/<method>/<category>/seed<k>/results.json` into `<root>/results.json`.

    Returns:
      The content of `<root>/results.json`: per method the metrics with mean, standard deviation and
      every seed's value, their summary (metrics/summary.py), and paired comparisons of the methods
      on the same images.
    """
    runs = defaultdict(list)
    for run in files.runs(root, "results.json"):
        result = _read_json(run / "results.json")
        runs[result["method"]].append({**result, "path": run.relative_to(root).as_posix()})
    for results in runs.values():
        results.sort(key=lambda run: (run["category"], run["seed"]))
    content = {
        "schema": evaluate.SCHEMA,
        "title": title,
        "dataset": next((r["dataset"] for results in runs.values() for r in results), ""),
        "methods": {name: _method(results, reference_domain) for name, results in runs.items()},
        "comparisons": _comparisons(root, runs),
        "reference_domain": reference_domain or None,
    }
    files.write_text(root / "results.json", json.dumps(content, indent=1))
    return content


def _method(runs: list[dict], reference_domain: str) -> dict:
    by_key = defaultdict(lambda: defaultdict(dict))
    for run in runs:
        official = _is_official(run)
        for key, domains in run["metrics"].items():
            for domain, values in domains.items():
                values = metrics.officially_rounded(values) if official else values
                by_key[key][domain][str(run["seed"])] = values
    table = {
        key: {domain: _over_seeds(seeds) for domain, seeds in domains.items()}
        for key, domains in by_key.items()
    }
    return {
        "metrics": table,
        "summary": metrics.summarise(table, reference_domain or None),
        "combinations": _combinations(runs),
        "runs": [{name: run[name] for name in ("category", "seed", "path")} for run in runs],
        "notes": sorted({note for run in runs for note in run["facts"]["notes"]}) + _notes(runs),
    }


def _is_official(run: dict) -> bool:
    return run["facts"].get("eval", {}).get("metrics_mode") == metrics.OFFICIAL_MODE


def _notes(runs: list[dict]) -> list[str]:
    """Notes on the numbers: the official mode, and the errors of the streaming form, rounded up."""
    notes = []
    if any(map(_is_official, runs)):
        notes.append(
            "metrics_mode=mmr, to be compared with the paper's tables: masks and labels as in the "
            "official code, and image AUROC and PRO (MMR) of every seed, category and domain are "
            "rounded to 3 decimals before they are averaged; pixel AUROC is not"
        )
    entries = [v for run in runs for domains in run["metrics"].values() for v in domains.values()]
    errors = metrics.largest_errors(entries)
    if errors:
        listed = ", ".join(f"{n} {math.ceil(1e4 * e) / 100:.2f}" for n, e in errors.items())
        notes.append(
            "pixel metrics come from integer histograms of the scores (eval.pixel_metrics); "
            f"largest possible error in points: {listed}"
        )
    return notes


def _over_seeds(seeds: dict[str, dict]) -> dict:
    """Mean, sample standard deviation and single values; interval ends are averaged over seeds."""
    first = next(iter(seeds.values()))
    merged = {"counts": first["counts"], "reasons": first.get("reasons", {})}
    merged |= {name: _one_over_seeds(seeds, name) for name in metrics.METRICS}
    merged["defects"] = _defects_over_seeds(
        {seed: domain.get("defects", {}) for seed, domain in seeds.items()}
    )
    if errors := metrics.largest_errors(seeds.values()):
        merged["error_at_most"] = errors
    return merged


def _one_over_seeds(seeds: dict[str, dict], name: str) -> dict:
    values = {seed: entry.get(name) for seed, entry in seeds.items()}
    defined = [value for value in values.values() if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "ci95": _mean_interval([entry.get("ci95", {}).get(name) for entry in seeds.values()]),
        "seeds": values,
    }


def _defects_over_seeds(seeds: dict[str, dict]) -> dict[str, dict]:
    """{kind of defect: its metrics over seeds}, of `metrics.by_defect` per seed."""
    kinds = sorted({kind for kinds in seeds.values() for kind in kinds})
    return {
        kind: _kind_over_seeds({s: kinds[kind] for s, kinds in seeds.items() if kind in kinds})
        for kind in kinds
    }


def _kind_over_seeds(seeds: dict[str, dict]) -> dict:
    first = next(iter(seeds.values()))
    counted = {name: first[name] for name in ("images", "groups")}
    names = ("image_auroc", *metrics.MISSED)
    return {**counted, "reasons": first["reasons"]} | {n: _one_over_seeds(seeds, n) for n in names}


def _combinations(runs: list[dict]) -> list[dict]:
    """Each defect under each condition, over seeds; empty but for the cross-domain tracks."""
    by_place = defaultdict(dict)
    for run in runs:
        for entry in run.get("combinations") or []:
            place = (entry["part"], entry["condition"], entry["defect"], entry["unseen"])
            by_place[place][str(run["seed"])] = entry
    names = ("part", "condition", "defect", "unseen")
    return [
        {
            **dict(zip(names, place, strict=True)),
            "good": next(iter(seeds.values()))["good"],
            **_kind_over_seeds(seeds),
        }
        for place, seeds in sorted(by_place.items())
    ]


def _mean_interval(intervals: list[list[float] | None]) -> list[float] | None:
    if not intervals or None in intervals:
        return None
    return [float(end) for end in np.mean(intervals, axis=0)]


def _comparisons(root: pathlib.Path, runs: dict[str, list[dict]]) -> list[dict]:
    """Paired group bootstrap of the image AUROC, seeds averaged, for every pair of methods."""
    scores = {name: _scores(root, results) for name, results in runs.items()}
    names, comparisons = sorted(scores), []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for key in sorted(scores[a].keys() & scores[b].keys()):
                first, second = scores[a][key], scores[b][key]
                if first.images != second.images or len(set(first.is_anomaly)) < 2:
                    continue  # other test images, or of one kind: nothing to pair
                row = paired.difference(first, second)["image_auroc"]
                row = {name: row[name] for name in ("difference", "ci95")}
                comparisons.append({"a": a, "b": b, "key": key, "metric": "image_auroc", **row})
    return comparisons


def _scores(root: pathlib.Path, runs: list[dict]) -> dict[str, paired.Scores]:
    """{key: scores of all seeds}; keys whose seeds have different test images are left out."""
    folders: dict[str, list[pathlib.Path]] = {}
    for run in runs:
        folders.setdefault(next(iter(run["metrics"])), []).append(root / run["path"])
    scores = {}
    for key, paths in folders.items():
        with contextlib.suppress(paired.OtherImages):
            scores[key] = paired.read(paths)
    return scores


def _read_json(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise files.unreadable(path, e) from e

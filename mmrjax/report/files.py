"""The files of a work directory as the report reads them, and pictures as data URIs.

mmrjax/evaluate/results.py writes the files of a run. A missing or damaged file of a run empties its
field and is named in `Run.missing`: half a run still makes a report.
"""

import base64
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

PICTURE_SIZES = ((288, 84), (256, 80), (224, 74), (192, 68), (160, 60), (112, 50))  # side, quality


class MethodInfo(Protocol):
    """The facts about a method that the report needs.

    Attributes:
        title: the method's name as papers write it.
        paper_weights: {role of a network: start of the weights file's name} of the paper.
    """

    title: str
    paper_weights: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of one method, category and seed; an absent file is empty and named in missing."""

    method: str
    title: str  # the method's
    key: str  # "<dataset>/<category>"
    seed: int
    folder: pathlib.Path
    path: str  # relative to the work directory
    results: dict
    config: dict
    log: list[dict]
    scores: dict[str, list]
    curves: dict
    gallery: dict
    missing: list[str]


def read_workdir(workdir: pathlib.Path, about: Mapping[str, MethodInfo]) -> tuple[dict, list[Run]]:
    """The aggregate results.json and every run that it lists, in its order.

    Each method in the aggregate gets its "title" and "paper_weights" from `about`; an unknown
    method gets its name and no weights.

    Raises:
        FileNotFoundError: there is no results.json.
        ValueError: results.json is damaged.
    """
    path = workdir / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no results.json in {workdir}; give the --workdir of a finished run, or finish it with"
            " python -m mmrjax.main --mode=evaluate"
        )
    try:
        aggregate = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged ({e}); evaluate the run again") from e
    runs = []
    for method, content in aggregate.get("methods", {}).items():  # a sweep has no methods
        info = about.get(method)
        content["title"] = info.title if info else method
        content["paper_weights"] = info.paper_weights if info else {}
        keys = {key.rpartition("/")[2]: key for key in content["metrics"]}
        for listed in content.get("runs") or []:
            key = keys.get(listed["category"], f"{aggregate.get('dataset')}/{listed['category']}")
            runs.append(_read_run(workdir, method, content["title"], key, listed))
    return aggregate, runs


def _read_run(workdir: pathlib.Path, method: str, title: str, key: str, listed: Mapping) -> Run:
    """Reads the folder of a run."""
    folder, missing = workdir / listed["path"], []

    def read(name: str, parse, empty, required: bool = True):
        try:
            return parse((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            missing.extend([f"{name} is absent"] if required else [])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            missing.append(f"{name} cannot be read ({e})")
        return empty

    return Run(
        method=method,
        title=title,
        key=key,
        seed=listed["seed"],
        folder=folder,
        path=str(listed["path"]),
        results=read("results.json", json.loads, {}),
        config=read("config.json", json.loads, {}, required=False),
        log=read("metrics.jsonl", _parse_log, [], required=False),
        scores=read("scores.csv", _parse_scores, {}),
        curves=read("curves.json", json.loads, {}),
        gallery=read("maps/gallery.json", json.loads, {}),
        missing=missing,
    )


def _parse_log(text: str) -> list[dict]:
    """Lines of metrics.jsonl; a last line cut short by a killed run is dropped."""
    lines = [line for line in text.splitlines() if line.strip()]
    complete = lines if text.endswith("\n") else lines[:-1]
    return [json.loads(line) for line in complete]


def _parse_scores(text: str) -> dict[str, list]:
    """Columns label, domain and score of scores.csv; scores as float [n]."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    columns = {name: np.array([row[name] for row in rows]) for name in ("label", "domain")}
    return columns | {"score": np.array([float(row["score"]) for row in rows])}


def picture_link(run: Run, item: Mapping, name: str) -> str:
    """Path of a picture relative to the work directory, "" if the item has no such picture."""
    return f"{run.path}/maps/{pathlib.Path(item[name]).name}" if item.get(name) else ""


def picture_size(runs: Sequence[Run], budget: int) -> tuple[int, int]:
    """The largest (side, quality) at which the galleries of these runs fit the budget in bytes."""
    names = [
        (run, item[name])
        for run in runs
        for item in run.gallery.get("items") or []
        for name in ("image", "truth", "heat")
        if item.get(name)
    ]
    sample = names[:: max(1, len(names) // 24)]  # enough to estimate the total
    for size, quality in PICTURE_SIZES:
        total = sum(len(embed_picture(run, name, size, quality) or "") for run, name in sample)
        if total * len(names) <= budget * max(1, len(sample)):
            break
    return size, quality


def embed_picture(run: Run, name: str | None, size: int, quality: int) -> str | None:
    """A picture of a run's gallery as a WebP data URI at most `size` wide and high."""
    if not name:
        return None
    try:
        path = run.folder / "maps" / pathlib.Path(name).name
        image = Image.open(path, formats=("PNG",)).convert("RGB")
    except OSError:
        text = f"maps/{pathlib.Path(name).name} is absent or damaged"
        run.missing.extend([text] if text not in run.missing else [])
        return None
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")

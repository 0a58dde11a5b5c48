"""One table of runs in which some fields differ from row to row.

A configuration declares the table as `config.sweep`, see configs/aebad_ablation.py. A row is an
ordinary run in <workdir>/<row>/ and is resumed, repeated and reported like a run that is started by
hand. The row that changes no value lies in <workdir>/default/, so that several tables in one work
directory share it. The comparison lies in <workdir> and is written anew after every row. With
`sweep.judge=held_out_defects` no row sees the test (data/judge.py) and the comparison is a ranking.
main.py calls this module.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Sequence

from absl import logging
from ml_collections import ConfigDict

from mmrjax import methods, metrics
from mmrjax.report import page as report
from mmrjax.report import words
from mmrjax.runs import records
from mmrjax.runs import workdir as workdir_lib
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import files, processes

RunAll = Callable[[ConfigDict, pathlib.Path], tuple[dict, pathlib.Path]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A planned row.

    Attributes:
      label: the row's name in the table.
      overrides: "group.field=value" each.
      paper: percent, one number for each metric of `config.sweep.metrics`; or a text instead.
      config: the configuration of the run.
      folder: its name in the work directory.
    """

    label: str
    overrides: tuple[str, ...]
    paper: tuple[float, ...] | str
    config: ConfigDict
    folder: str


def run(config: ConfigDict, workdir: pathlib.Path, run_all: RunAll) -> tuple[dict, pathlib.Path]:
    """Runs every row in turn and compares them.

    Args:
      config: with `sweep.rows`.
      workdir: the work directory of the sweep.
      run_all: (config, workdir of a row) -> (aggregate, path of its report.html).

    Returns:
      (content of <workdir>/results.json, path of report.html).

    Raises:
      ValueError, FileNotFoundError: a row that cannot work, before any row is run; a work directory
        with other runs.
    """
    if files.runs(workdir, "config.json"):
        raise ValueError(f"{workdir} holds runs of one configuration; use another --workdir")
    rows = plan(config)
    _check_judge(config, workdir)
    waiting = [
        row.config
        for row in rows
        if not workdir_lib.has_results(
            row.config, workdir_lib.results_root(row.config, workdir / row.folder)
        )
    ]
    processes.first(lambda: records.check_needs(waiting))  # before days of training
    finished: dict[str, dict] = {}

    def compare(row: Row, aggregate: dict, page: pathlib.Path) -> tuple[dict, str]:
        finished[row.label] = {
            "report": page.relative_to(workdir).as_posix(),
            "methods": _measured(aggregate, page.parent, config),
        }
        content = _content(config, rows, finished)
        files.write_text(workdir / "results.json", json.dumps(content, indent=1))
        return content, str(report.write_report(workdir, methods.METHODS))

    for i, row in enumerate(rows):
        logging.info("row %d of %d: %s", i + 1, len(rows), row.label)
        done = run_all(row.config, workdir / row.folder)
        # After every row, so that a stopped sweep shows its finished rows.
        content, path = processes.first(functools.partial(compare, row, *done))
    return content, pathlib.Path(path)


def _check_judge(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError if the table in the work directory was judged in another way."""
    table = files.read_json(workdir / "results.json") or {}
    before = table.get("judge", "test")
    if "rows" in table and before != config.sweep.judge:
        raise ValueError(
            f"{workdir} holds a table with sweep.judge={before}, this call has "
            f"sweep.judge={config.sweep.judge}; use another --workdir"
        )


def plan(config: ConfigDict) -> list[Row]:
    """The rows of `config.sweep`, each with its own validated configuration.

    Raises:
      ValueError: an override that names no field or an impossible value, or two rows in one folder.
    """
    rows = []
    for label, overrides, paper in config.sweep.rows:
        is_shown = config.sweep.judge == "test" and not isinstance(paper, str)
        if is_shown and len(paper) != len(config.sweep.metrics):
            names = ", ".join(config.sweep.metrics)
            raise ValueError(f"sweep row {label!r}: give a number of the paper for each of {names}")
        own = config.copy_and_resolve_references()
        config_lib.override(own, overrides)
        unchanged = config_lib.flatten(own) == config_lib.flatten(config)
        own.sweep.rows = ()  # an ordinary run
        own.title = f"{config.title}: {label}"
        config_lib.validate(own, methods.METHODS)
        folder = "default" if unchanged else re.sub(r"[^\w.]+", "_", label).strip("_")
        rows.append(Row(label, tuple(overrides), paper, own, folder))
    folders = [row.folder for row in rows]
    if twice := sorted({name for name in folders if folders.count(name) > 1}):
        raise ValueError(f"sweep rows share a folder: {', '.join(twice)}; give them other labels")
    return rows


def _measured(aggregate: dict, root: pathlib.Path, config: ConfigDict) -> dict:
    """{method: mean and std over seeds of each metric, the seeds, the protocol, the departures}."""
    measured = {}
    for method, content in aggregate["methods"].items():
        table = content["metrics"]
        if config.sweep.average == "images":
            table = {key: {"all": domains["all"]} for key, domains in table.items()}
        summary = metrics.summarise(table)
        facts = files.read_json(root / content["runs"][0]["path"] / "results.json")["facts"]
        measured[method] = {
            "metrics": {
                name: {part: summary.get(name, {}).get(part) for part in ("mean", "std")}
                for name in config.sweep.metrics
            },
            "seeds": sorted({run["seed"] for run in content["runs"]}),
            "protocol": words.protocol(facts),
            "departures": words.departures(facts, methods.METHODS[method].paper_weights),
        }
    return measured


def _content(config: ConfigDict, rows: Sequence[Row], finished: dict[str, dict]) -> dict:
    """The content of results.json, in fractions; a row that has not run yet has no methods."""
    names = tuple(config.sweep.metrics)
    is_judged = config.sweep.judge != "test"  # the paper's numbers are those of the test

    def paper(row: Row) -> dict[str, float] | str:
        if is_judged or isinstance(row.paper, str):
            return "" if is_judged else row.paper
        return {name: round(n / 100, 6) for name, n in zip(names, row.paper, strict=True)}

    entries = [
        {
            "label": row.label,
            "overrides": list(row.overrides),
            "paper": paper(row),
            **finished.get(row.label, {"report": None, "methods": {}}),
        }
        for row in rows
    ]
    return {
        "schema": 1,
        "title": config.title,
        "source": "" if is_judged else config.sweep.source,
        "metrics": list(names),
        "average": config.sweep.average,
        **({"judge": config.sweep.judge} if is_judged else {}),
        "rows": entries,
    }

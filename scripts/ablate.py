"""What each improvement of MMR+ is worth: the grid of its switches, paired by seed, as a table.

    python scripts/ablate.py --config=configs/magnetic_tile.py --workdir=runs/ablate_tile \
        --evidence=docs/evidence/magnetic_tile --seeds=54,55,56 --config.data.raw_dir=<tiles>

Rows of one seed have the same initial student, masks and, where batches are filled alike, the same
crops; all seeds of a row are compared with those of the first row, which is MMR. Every finished run
leaves a small results.json in --evidence, and what is there is not run again, also without the work
directory; a killed call is repeated. The table, <evidence>/table.md, is written after every run.

A second table holds the rows against `longer`, which has as many steps as those with synthetic
defects. Two intervals stand beside a difference: over seeds (paired t, 95 %), whether training
again would show it; for the image AUROC also over groups of test images (paired bootstrap, 95 %),
whether other images would. `--looks` notes every run in the file of all looks at test labels
(search.py).
`--grid` names the rows; `--domain=none` leaves out the alignment of domains, for data whose
training images are of one domain.
"""

import argparse
import concurrent.futures
import csv
import datetime
import fractions
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import IO

import numpy as np
from scipy import stats

from mmrjax import compare, files, methods, report_tables, workdir
from mmrjax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parent.parent
METRICS = ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr", "tiny_recall")
LOOK_HEADS = ("date", "what", "seed", *METRICS, "why")
BASE = "base"
LONGER = "longer"  # MMR with as many steps as rows with synthetic defects, whose epochs are longer
OFF = {"hybrid": "false", "synthetic_every": 0, "tiny_weight": 1, "contrast": "none",
       "domain": "none"}  # fmt: skip
SYNTHETIC = {"synthetic_every": 4}
MORE_STEPS = fractions.Fraction(4, 3)  # of an epoch in which every 4th row is synthetic
FULL = {"hybrid": "true", **SYNTHETIC, "tiny_weight": 2, "contrast": "features"}
# {grid: {row: switches beside OFF}}; BASE, MMR itself, comes first in each. Spec, section 9.
GRIDS = {
    "parts": {
        LONGER: {"epochs": MORE_STEPS},
        "hybrid": {"hybrid": "true"},
        "synthetic": SYNTHETIC,
        "weight": {**SYNTHETIC, "tiny_weight": 2},
        "contrast": {**SYNTHETIC, "contrast": "features"},
        "domain": {**SYNTHETIC, "domain": "supcon"},
        "all": {**FULL, "domain": "supcon"},
    },
    "local_heads": {
        f"local_{share}": {"hybrid": "true", "local_heads": share}
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    },
    "sampling": {
        name: {"hybrid": "true", "sampling": name} for name in ("lattice", "random", "full")
    },
    "ratio": {f"1_to_{n - 1}": {"synthetic_every": n} for n in (8, 4, 2)},
    "tiny_weight": {
        f"{mode}_{w}": {**SYNTHETIC, "tiny_weight": w, "tiny_mode": mode}
        for mode in ("literal", "balanced")
        for w in (1, 2, 5, 10)
        if (mode, w) != ("balanced", 1)  # the same as literal
    },
}
# Not recorded: where things lie and how they are looked at, not what is trained.
FOREIGN = (*methods.METHODS["patchcore"].fields, *methods.METHODS["aminet"].fields)
PLACES = (*workdir.FREE_FIELDS, "teacher.weights", "student.init", "sweep.")


def rows_of(grid: str, domain: str, names: Sequence[str] = ()) -> dict[str, dict]:
    """{row: switches} of a grid, BASE first; with domain "none" without the row of that name.

    Raises:
      ValueError: a name that is no row of it.
    """
    rows = {BASE: {}}
    for name, switches in GRIDS[grid].items():
        if name == "domain" and domain == "none":
            continue
        rows[name] = {**switches, "domain": domain} if "domain" in switches else switches
    if unknown := [name for name in names if name not in rows]:
        raise ValueError(f"--rows={unknown[0]}: known are {', '.join(rows)}")
    return {n: s for n, s in rows.items() if not names or n in (BASE, *names)}


def command(spec: str, fields: Sequence[str], row: str, switches: dict, folder: pathlib.Path,
            seed: int) -> list[str]:  # fmt: skip
    """Arguments of mmrjax.main for one run in the work directory `folder`."""
    plain = row in (BASE, LONGER)
    own = {} if plain else {**OFF, **switches}
    if row == LONGER:
        epochs = int(config_lib.load(spec, fields).train.epochs * MORE_STEPS)
        fields = [*fields, f"train.epochs={epochs}"]
    return [
        f"--config={spec}",
        f"--workdir={folder}",
        *(f"--config.{field}" for field in fields),
        f"--config.method.names={'mmr' if plain else 'mmr_plus'}",
        *(f"--config.mmr_plus.{name}={value}" for name, value in own.items()),
        f"--config.train.seeds={seed}",
    ]


def trained_with(spec: str, fields: Sequence[str], foreign: tuple[str, ...] = ()) -> dict:
    """The fields that shape training and differ from configs/common.py; no path of a machine.

    `foreign`: beginnings of those that nothing here reads.
    """
    default = config_lib.flatten(config_lib.load(str(config_lib.PACKAGED / "common.py")))
    flat = config_lib.flatten(config_lib.load(spec, fields))
    changed = {
        k: v for k, v in flat.items() if v != default[k] and not k.startswith((*PLACES, *foreign))
    }
    return json.loads(json.dumps(changed))


def summary(folder: pathlib.Path, seed: int) -> tuple[dict, dict]:
    """What a finished run leaves: ({key: metrics, scores, facts}, {key: its test images})."""
    runs, images = {}, {}
    for path in sorted(folder.glob(f"*/*/seed{seed}/results.json")):
        result = files.read_json(path)
        ((key, domains),) = result["metrics"].items()
        with (path.parent / "scores.csv").open(newline="", encoding="utf-8") as file:
            scores = list(csv.DictReader(file))
        images[key] = [[row[n] for n in ("id", "label", "domain", "group")] for row in scores]
        facts = result["facts"]
        runs[key] = {
            "metrics": {
                d: {m: v.get(m) for m in METRICS} | {"counts": v["counts"]}
                for d, v in domains.items()
            },
            "facts": {n: facts[n] for n in ("teacher", "student", "seconds", "versions")
                      if n in facts},
            "scores": [float(f"{float(row['score']):.6g}") for row in scores],
        }  # fmt: skip
    return runs, images


def run_grid(
    spec: str,
    fields: Sequence[str],
    rows: dict[str, dict],
    seeds: Sequence[int],
    folder: pathlib.Path,
    evidence: pathlib.Path,
    start: Callable[[list[str]], int],
    jobs: int = 1,
    looks: pathlib.Path | None = None,
) -> int:
    """Runs what is not in `evidence` yet, `jobs` at once; the first exit status not 0, else 0.

    Seeds outside, rows inside: a stopped grid has whole pairs. `start` runs mmrjax.main; after one
    that fails no other is started. Every run is noted in `looks`, if given.

    Raises:
      ValueError: what is there was trained with other fields, or tested on other images.
    """
    trained = trained_with(spec, fields, FOREIGN)
    every = [(row, seed) for seed in dict.fromkeys(seeds) for row in rows]
    wanted = [one for one in every if not _is_there(*one, spec, trained, rows, evidence)]
    writing, failed = threading.Lock(), []

    def finish(row: str, seed: int) -> None:
        if failed:
            return
        home = folder / row / f"seed{seed}"
        if status := start(command(spec, fields, row, rows[row], home, seed)):
            failed.append(status)
            return
        runs, images = summary(home, seed)
        if not runs:
            raise ValueError(
                f"{home} holds no results; fields of eval by which it is seen otherwise than "
                "trained put them elsewhere, and have no place in a grid"
            )
        content = {**_expected(row, seed, spec, trained, rows), "runs": runs}
        with writing:
            for key, run in runs.items() if looks else ():
                note_look(looks, f"grid {row}", seed, run["metrics"]["all"], f"{spec}, {key}")
            check_images(images, evidence / "images.json")
            files.write_text(_path(row, seed, evidence), json.dumps(content) + "\n")
            write_table(evidence, rows)

    at_once([functools.partial(finish, *one) for one in wanted], jobs)
    write_table(evidence, rows)
    return failed[0] if failed else 0


def _expected(row: str, seed: int, spec: str, trained: dict, rows: dict[str, dict]) -> dict:
    """What the results of a run begin with."""
    switches = {name: str(value) for name, value in rows[row].items()}
    return {"config": spec, "fields": trained, "row": row, "seed": seed, "switches": switches}


def _path(row: str, seed: int, evidence: pathlib.Path) -> pathlib.Path:
    return evidence / row / f"seed{seed}" / "results.json"


def _is_there(
    row: str, seed: int, spec: str, trained: dict, rows: dict[str, dict], evidence: pathlib.Path
) -> bool:
    """Whether the run has results; raises ValueError if they were trained with other fields."""
    path = _path(row, seed, evidence)
    found = files.read_json(path)
    if found is None:
        return False
    kept = {k: v for k, v in found.get("fields", {}).items() if not k.startswith(FOREIGN)}
    check_same(_expected(row, seed, spec, trained, rows), {**found, "fields": kept}, path)
    return True


def at_once(work: Sequence[Callable[[], None]], jobs: int) -> None:
    """Calls all of `work`, `jobs` at once.

    After an exception or Ctrl-C nothing else is started; it is raised when what runs has ended, so
    that the same call can be repeated.
    """
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    done = [pool.submit(one) for one in work]
    try:
        for future in concurrent.futures.as_completed(done):
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_same(expected: dict, found: dict, path: pathlib.Path) -> None:
    """Raises ValueError if a result at hand differs from what this call would run."""
    for name, value in expected.items():
        before = found.get(name)
        if isinstance(value, dict) and isinstance(before, dict):  # only what differs is told
            differing = {k for k in value | before if value.get(k) != before.get(k)}
            before, value = ({k: x.get(k) for k in sorted(differing)} for x in (before, value))
        if before != value:
            raise ValueError(
                f"{path} was made with {name} {before}, this call has {value}; use "
                "another --evidence"
            )


def check_images(images: dict, path: pathlib.Path) -> None:
    """Writes the test images of the first run; raises ValueError if a later one has others."""
    stored = files.read_json(path)
    if stored is not None and stored != images:
        raise ValueError(
            f"{path} lists other test images than this run has; use another --evidence"
        )
    if stored is None:
        files.write_text(path, json.dumps(images) + "\n")


def note_look(looks: pathlib.Path, what: str, seed: int, metrics: dict, why: str) -> None:
    """Adds a line to a CSV file that has one for every look at test labels; made if missing.

    The same look is not noted twice, on whatever day.
    """
    values = [report_tables.percent(metrics.get(name)) for name in METRICS]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    line = [today, what, str(seed), *values, why]
    with looks.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        noted = list(csv.reader(file))
        writer = csv.writer(file, lineterminator="\n")
        if not noted:
            writer.writerow(LOOK_HEADS)
        if line[1:] not in [before[1:] for before in noted]:
            writer.writerow(line)


def write_table(evidence: pathlib.Path, rows: dict[str, dict]) -> None:
    """Writes <evidence>/table.md over the rows and whatever else has finished runs there."""
    found = {}
    known = dict.fromkeys([BASE, *(row for grid in GRIDS.values() for row in grid), *rows])
    for row in [name for name in known if name in rows or (evidence / name).is_dir()]:
        runs = {}
        for path in sorted((evidence / row).glob("seed*/results.json")):
            content = files.read_json(path)
            runs[content["seed"]] = content["runs"]
        found[row] = runs
    images = files.read_json(evidence / "images.json") or {}
    text = "".join(_section(key, found, images[key]) for key in images)
    files.write_text(evidence / "table.md", text)


def _section(key: str, found: dict, images: list) -> str:
    """One data set: all images, and the image AUROC of each domain."""
    domains = sorted({image[2] for image in images} - {""})
    lines = [f"## {key}", "", "Percent over all test images, mean over seeds; difference to the "
             "first row in points [95 % over seeds; image AUROC: | 95 % over groups of images].",
             ""]  # fmt: skip
    known = {m: [_values(runs, key, "all", m) for runs in found.values()] for m in METRICS}
    most = [max(map(len, rows)) for rows in zip(*known.values(), strict=True)]
    shown = [m for m in METRICS if [*map(len, known[m])] == most]  # older evidence has fewer
    heads = ["row", "seeds", *shown]
    cells = [[row, _seeds(runs), *(_cell(found, row, key, "all", m, images) for m in shown)]
             for row, runs in found.items()]  # fmt: skip
    lines += markdown([heads, *cells])
    if found.get(LONGER):
        lines += ["", f"The same rows, with the difference to `{LONGER}`:", ""]
        cells = [[row, _seeds(runs), *(_cell(found, row, key, "all", m, images, LONGER)
                                       for m in shown)]
                 for row, runs in found.items() if row not in (BASE, LONGER)]  # fmt: skip
        lines += markdown([heads, *cells])
    if len(domains) > 1:
        lines += ["", "Image AUROC by domain:", ""]
        cells = [[row, *(_cell(found, row, key, d, "image_auroc", images) for d in domains)]
                 for row in found]  # fmt: skip
        lines += markdown([["row", *domains], *cells])
    return "\n".join(lines) + "\n\n"


def markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a table, whose first row is the heading."""
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _seeds(runs: dict) -> str:
    return ", ".join(map(str, sorted(runs))) or "not run yet"


def _values(runs: dict, key: str, domain: str, metric: str) -> dict[int, float]:
    values = {s: run[key]["metrics"][domain].get(metric) for s, run in runs.items() if key in run}
    return {seed: value for seed, value in values.items() if value is not None}


def _cell(found: dict, row: str, key: str, domain: str, metric: str, images: list,
          against: str = BASE) -> str:  # fmt: skip
    """`74.3 (+0.4 [-0.2, +1.0])`: mean, paired difference to another row, its intervals."""
    own, base = (_values(found[name], key, domain, metric) for name in (row, against))
    if not own:
        return "–"
    mean = report_tables.percent(float(np.mean(list(own.values()))))
    both = sorted(own.keys() & base.keys())
    if row == against or not both:
        return mean
    difference, interval = paired([own[s] for s in both], [base[s] for s in both])
    parts = [_interval(interval)]
    if metric == "image_auroc":
        scores = [[found[name][s][key]["scores"] for s in both] for name in (row, against)]
        parts.append(_interval(over_groups(*map(np.array, scores), images, domain)))
    return f"{mean} ({100 * difference:+.1f} [{' | '.join(parts)}])"


def _interval(ends: Sequence[float] | None) -> str:
    return "–" if ends is None else "{:+.1f}, {:+.1f}".format(*(100 * end for end in ends))


def paired(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of a - b over seeds and its 95 % t interval; no interval of a single pair."""
    gaps = np.subtract(a, b)
    if len(gaps) < 2:
        return float(gaps.mean()), None
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    return float(gaps.mean()), (float(gaps.mean() - half), float(gaps.mean() + half))


def over_groups(
    a: np.ndarray, b: np.ndarray, images: list, domain: str = "all"
) -> list[float] | None:
    """The 95 % interval over groups of images of the image AUROC's difference; scores [s, n]."""
    scores = [compare.Scores([tuple(image) for image in images], x) for x in (a, b)]
    if domain != "all":
        scores = [one.of_domain(domain) for one in scores]
    if len(set(scores[0].is_anomaly.tolist())) < 2:
        return None
    return compare.difference(*scores)["image_auroc"]["ci95"]


def start_program(arguments: list[str], log: IO | None = None) -> int:
    """Runs mmrjax.main in a process of its own, which gives its memory back; its exit status."""
    command = [sys.executable, "-m", "mmrjax.main", *arguments]
    return subprocess.run(command, check=False, stdout=log, stderr=log).returncode


def split_fields(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The fields of --config.<group>.<field>=<value>, and the other arguments."""
    fields = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    return fields, [a for a in argv if not a.startswith("--config.")]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the fields of --config.<group>.<field>=<value>."""
    parser = argparse.ArgumentParser(
        prog="scripts/ablate.py",
        description="The grid of MMR+'s switches, paired by seed.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="configs/<name>.py[:argument]")
    parser.add_argument(
        "--workdir", required=True, type=files.local_path, help="a folder for every run in it"
    )
    parser.add_argument(
        "--evidence", required=True, type=files.local_path, help="results and table"
    )
    parser.add_argument(
        "--looks", type=files.local_path, help="CSV file to note every run on test images in"
    )
    parser.add_argument("--seeds", default="54,55,56,57,58")
    parser.add_argument("--grid", default="parts", choices=sorted(GRIDS))
    parser.add_argument("--rows", default="", help="some rows of the grid; the base always runs")
    parser.add_argument("--domain", default="supcon", choices=("supcon", "coral", "none"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, for a GPU")
    fields, rest = split_fields(argv)
    return parser.parse_args(rest), fields


def main(
    argv: Sequence[str] | None = None, start: Callable[[list[str]], int] = start_program
) -> int:
    """Runs the grid and prints the table; the exit status."""
    arguments, fields = parse(sys.argv[1:] if argv is None else argv)
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
        names = [name for name in arguments.rows.split(",") if name]
        rows = rows_of(arguments.grid, arguments.domain, names)
        if arguments.jobs < 1:
            raise ValueError(f"--jobs={arguments.jobs}: must be at least 1")
        if arguments.jobs > 1:  # each would take most of a GPU's memory when it starts
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        status = run_grid(
            *(arguments.config, fields, rows, seeds, arguments.workdir, arguments.evidence),
            *(start, arguments.jobs, arguments.looks),
        )
    except (ValueError, OSError) as e:
        print(f"error: {files.explain(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    table = arguments.evidence / "table.md"
    if table.exists():
        print(table.read_text())
    return status


if __name__ == "__main__":
    sys.exit(main())

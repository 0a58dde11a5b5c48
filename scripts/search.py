"""Which setting finds defects on the magnetic tiles best, judged without a look at their test.

    python scripts/search.py make --data_dir=<records> --output=<set>
    python scripts/search.py run --set=<set> --workdir=runs/search --jobs=8 \
        --evidence=docs/evidence/search --config.teacher.weights=<resnet18 file, or imagenet>
    python scripts/search.py look --candidate=<name> --why="<reason>" --workdir=runs/looks \
        --looks=docs/evidence/looks.csv --config.data.raw_dir=<tiles> --config.teacher.weights=<...>

`make` splits the training tiles by group and puts defects of another make into those kept apart
(search_set.py). `run` trains and tests every candidate there, each in a process of its own, --jobs
of them at once, and ranks them by the mean of image AUROC, pixel AUROC and aupro_0.3 in
<evidence>/table.md. A finished run leaves a small results.json in --evidence and is not run again,
also without the work directory; what failed is named at the end, and the same call tries it again.
`look` trains one candidate on all training tiles, tests it on the test tiles and adds a line to
--looks: whatever was ever decided after a look at test labels can be read there.

A candidate is a method and changes of configs/magnetic_tile.py, joined by "+": `mmr`,
`mmr_plus+synthetic+384`. Any combination of CHANGES may be given, not only those of CANDIDATES.
"""

import argparse
import csv
import functools
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence

import ablate
import cv2
import numpy as np
import search_set

from data_builders import build
from mmrjax import methods
from mmrjax.data import records as records_lib
from mmrjax.report import tables
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import files

SPEC = "configs/magnetic_tile.py"
RANKED = ("image_auroc", "pixel_auroc", "aupro_0.3")
METRICS = (*RANKED, "pro_mmr", "tiny_recall")
SEARCHED = ("data.name=folder",)  # the set, in place of the tiles
BASE = "patchcore"  # that others are held against
METHODS = {
    "mmr": (),
    "mmr_plus": tuple(f"mmr_plus.{name}={value}" for name, value in ablate.OFF.items()),
    "patchcore": (),
}


def _size(n: int) -> tuple[str, ...]:
    return (f"data.image_size={n},{n}", f"data.resize={n},{n}")


# {name: fields that differ}; later ones of a candidate win.
CHANGES = {
    **{str(n): _size(n) for n in (112, 160, 320, 384, 448)},
    "tiles": ("data.tiling=true", "data.resize=448,448"),  # windows of 224
    "synthetic": ("mmr_plus.synthetic_every=4",),
    "half": ("mmr_plus.synthetic_every=2",),
    "weight": ("mmr_plus.tiny_weight=2",),
    "balanced": ("mmr_plus.tiny_weight=2", "mmr_plus.tiny_mode=balanced"),
    "contrast": ("mmr_plus.contrast=features",),
    "hybrid": ("mmr_plus.hybrid=true",),
    **{f"mask{n}": (f"student.mask_ratio={n / 100}",) for n in (0, 20, 60, 80)},
    **{f"epochs{n}": (f"train.epochs={n}",) for n in (20, 100, 200)},
    "small": ("student.size=small",),  # of the depth 6, as the tiny one
    "small12": ("student.size=small", "student.depth=12"),
    "base": ("student.size=base", "student.depth=12"),
    "learn12": ("student.layers=1,2",),
    "learn23": ("student.layers=2,3",),
    "learn3": ("student.layers=3",),
    "view": ("train.augment=none",),  # trained as it is tested, without crops and flips
    "bank123": ("patchcore.layers=1,2,3", "patchcore.candidates=200000"),
    # Banks drawn from a part of the patches, whose share is of all: those of 448 px take 7 GB.
    "sampled": ("patchcore.candidates=200000", "patchcore.coreset=0.02"),
    "sparse": ("patchcore.candidates=200000", "patchcore.coreset=0.004"),
    "sparser": ("patchcore.candidates=200000", "patchcore.coreset=0.001"),
    "capped": ("patchcore.candidates=200000",),  # 1 % of the patches, chosen from these
    **{f"scales{n}": (f"patchcore.scales={n / 100},1",) for n in (25, 50)},
    "coreset10": ("patchcore.coreset=0.1", "patchcore.candidates=200000"),
    "width384": ("patchcore.width=384",),
    "patch5": ("patchcore.patch=5",),
    "raw": ("patchcore.score=patch",),
    "whiten": ("patchcore.whiten=0.1",),
    "relative": ("patchcore.relative=true",),
    "finer": ("patchcore.scales=1.5",),
    "places": ("score.by_place=true",),
}
CANDIDATES = (
    *("mmr", "mmr+320", "mmr+384", "mmr+448", "mmr+tiles"),
    *("mmr+mask0", "mmr+mask20", "mmr+mask60", "mmr+mask80"),
    *("mmr+epochs20", "mmr+epochs100", "mmr+epochs200"),
    *("mmr+small", "mmr+small12", "mmr+base", "mmr+view"),
    *("mmr+learn12", "mmr+learn23", "mmr+learn3"),
    *("mmr_plus+synthetic", "mmr_plus+half", "mmr_plus+synthetic+weight"),
    *("mmr_plus+synthetic+balanced", "mmr_plus+synthetic+contrast", "mmr_plus+hybrid"),
    *("mmr_plus+synthetic+384", "mmr_plus+synthetic+tiles", "mmr_plus+half+384"),
    *("mmr_plus+synthetic+epochs100", "mmr_plus+synthetic+384+epochs100"),
    *("mmr_plus+synthetic+384+small", "mmr_plus+synthetic+384+small+epochs100"),
    *("mmr_plus+synthetic+contrast+384+epochs100",),
    *("patchcore", "patchcore+sampled", "patchcore+sparse+320", "patchcore+sparse+384"),
    *("patchcore+sparse+448", "patchcore+finer", "patchcore+width384"),
    *("patchcore+bank123", "patchcore+sparser+384+bank123", "patchcore+coreset10"),
    *("patchcore+patch5", "patchcore+raw", "patchcore+sparse+384+raw"),
    *("patchcore+sparse+384+patch5", "patchcore+sparse+384+width384"),
    *("patchcore+whiten", "patchcore+relative", "patchcore+whiten+relative"),
    *("patchcore+whiten+relative+sparse+384", "patchcore+whiten+relative+bank123"),
    *("patchcore+places", "patchcore+sparse+384+places", "mmr+places", "mmr+learn12+places"),
    *("mmr+384+places", "mmr_plus+synthetic+384+places"),
    *("patchcore+112+places", "patchcore+160+places", "patchcore+448+capped+places"),
    *("patchcore+448+capped+scales25+places", "patchcore+448+capped+scales50+places"),
)


def fields_of(candidate: str) -> list[str]:
    """The fields of a candidate, "group.field=value" each.

    Raises:
      ValueError: a method or a change that is not known.
    """
    method, *changes = candidate.split("+")
    for name, known in ((method, METHODS), *((change, CHANGES) for change in changes)):
        if name not in known:
            raise ValueError(f"candidate {candidate}: unknown {name!r}; known: {', '.join(known)}")
    common = ("mmr_plus.domain=none", f"method.names={method}")
    return [*common, *METHODS[method], *(field for c in changes for field in CHANGES[c])]


def summary(folder: pathlib.Path) -> tuple[dict, list]:
    """What a finished run leaves: (its small results, its test images)."""
    (path,) = folder.glob("*/*/seed*/results.json")
    result = files.read_json(path)
    ((_, domains),) = result["metrics"].items()
    with (path.parent / "scores.csv").open(newline="", encoding="utf-8") as file:
        scores = list(csv.DictReader(file))
    kinds = {
        kind: {name: entry[name] for name in ("images", "image_auroc", "missed_at_5")}
        for kind, entry in domains["all"]["defects"].items()
    }
    small = {
        "metrics": {name: domains["all"].get(name) for name in METRICS},
        "kinds": kinds,
        "facts": {n: result["facts"][n] for n in ("teacher", "seconds", "versions", "device")
                  if n in result["facts"]},
        "scores": [float(f"{float(row['score']):.6g}") for row in scores],
    }  # fmt: skip
    return small, [[row[n] for n in ("id", "label", "domain", "group")] for row in scores]


def run(
    candidates: Sequence[str],
    fields: Sequence[str],
    seeds: Sequence[int],
    folder: pathlib.Path,
    evidence: pathlib.Path,
    jobs: int,
    start: Callable[..., int],
) -> list[str]:
    """Runs what is not in `evidence` yet, `jobs` at once; returns what failed.

    Args:
      candidates: as `fields_of` takes them.
      fields: "group.field=value" for all of them, with data.raw_dir, the set.
      seeds: of the trainings.
      folder: of the runs, <candidate>/seed<k> in it, each with a log.txt.
      evidence: folder of the small results and the table.
      jobs: runs at once.
      start: (arguments of mmrjax.main, log) -> exit status.

    Raises:
      ValueError: an impossible candidate, before any is run; what is there was made with other
        fields or on another set.
    """
    digest = _build(fields)
    wanted = [
        _expected(name, seed, fields, digest)
        for seed in dict.fromkeys(seeds)  # outside: a stopped search has compared all
        for name in dict.fromkeys(candidates)
    ]
    wanted = [one for one in wanted if not _is_there(one, evidence)]
    writing, failed = threading.Lock(), []

    def finish(expected: dict) -> None:
        name, seed = expected["candidate"], expected["seed"]
        home = folder / name / f"seed{seed}"
        if status := _start(SEARCHED, name, seed, fields, home, start):
            failed.append(f"{name}, seed {seed}: exit status {status}; see {home / 'log.txt'}")
            return
        small, images = summary(home)
        with writing:
            ablate.check_images({"images": images}, evidence / "images.json")
            files.write_text(_path(expected, evidence), json.dumps({**expected, **small}) + "\n")
            write_table(evidence)

    ablate.at_once([functools.partial(finish, one) for one in wanted], jobs)
    write_table(evidence)
    return failed


def _expected(name: str, seed: int, fields: Sequence[str], digest: str) -> dict:
    """What the results of a run begin with; raises ValueError for an impossible candidate."""
    own = [*SEARCHED, *fields_of(name), *fields]
    config = config_lib.load(SPEC, own)
    config_lib.validate(config)
    methods.create(config.method.names[0], config)
    trained = ablate.trained_with(SPEC, own)
    return {"config": SPEC, "candidate": name, "seed": seed, "set": digest, "fields": trained}


def _path(expected: dict, evidence: pathlib.Path) -> pathlib.Path:
    return evidence / expected["candidate"] / f"seed{expected['seed']}" / "results.json"


def _is_there(expected: dict, evidence: pathlib.Path) -> bool:
    """Whether the run has results; raises ValueError if they are of other fields or data."""
    path = _path(expected, evidence)
    found = files.read_json(path)
    if found is not None:
        ablate.check_same(expected, found, path)
    return found is not None


def _start(
    data: Sequence[str],
    name: str,
    seed: int,
    fields: Sequence[str],
    home: pathlib.Path,
    start: Callable[..., int],
) -> int:
    """Trains and tests a candidate in the work directory `home`; the exit status."""
    arguments = [f"--config={SPEC}", f"--workdir={home}", f"--config.train.seeds={seed}"]
    own = [f"--config.{field}" for field in (*data, *fields_of(name), *fields)]
    home.mkdir(parents=True, exist_ok=True)
    with (home / "log.txt").open("a", encoding="utf-8") as log:
        return start([*arguments, *own], log)


def look(
    candidate: str,
    fields: Sequence[str],
    seed: int,
    folder: pathlib.Path,
    looks: pathlib.Path,
    why: str,
    start: Callable[..., int],
) -> dict:
    """Trains a candidate on all training tiles, tests it on the test tiles and notes that.

    Args:
      candidate: as `fields_of` takes it.
      fields: "group.field=value", with data.raw_dir or data.data_dir, the tiles.
      seed: of the training.
      folder: of the run, as of `run`.
      looks: as of `ablate.note_look`.
      why: the reason for the look.
      start: as of `run`.

    Returns:
      {metric: value}, METRICS.

    Raises:
      ValueError: an impossible candidate; the run failed, in which case nothing is noted.
    """
    home = folder / candidate / f"seed{seed}"
    if status := _start((), candidate, seed, fields, home, start):
        raise ValueError(f"{candidate}, seed {seed}: exit status {status}; see {home / 'log.txt'}")
    metrics = summary(home)[0]["metrics"]
    ablate.note_look(looks, candidate, seed, metrics, why)
    return metrics


def _build(fields: Sequence[str]) -> str:
    """Builds the records, once for all processes; the digest of what they hold."""
    data = config_lib.load(SPEC, fields).data
    (directory,) = build.build("folder", data.raw_dir, data.data_dir).values()
    return records_lib.load(directory).digest


def write_table(evidence: pathlib.Path) -> None:
    """Writes <evidence>/table.md over all that was ever run there, the best first."""
    found: dict[str, list[dict]] = {}
    for path in sorted(evidence.glob("*/seed*/results.json")):
        content = files.read_json(path)
        found.setdefault(content["candidate"], []).append(content)
    images = (files.read_json(evidence / "images.json") or {}).get("images", [])
    names = sorted(found, key=lambda name: _rank(found[name]), reverse=True)
    kinds = sorted({kind for runs in found.values() for run in runs for kind in run["kinds"]})
    heads = ["candidate", "seeds", "mean of three", *METRICS, "minutes"]
    rows = [
        [
            name,
            ", ".join(str(run["seed"]) for run in found[name]),
            tables.percent(_rank(found[name])),
            *(_cell(found, name, metric, images) for metric in METRICS),
            f"{np.mean([_minutes(run) for run in found[name]]):.1f}",
        ]
        for name in names
    ]
    by_kind = [
        [name, *(f"{_of_kind(found[name], k, 'image_auroc')} / "
                 f"{_of_kind(found[name], k, 'missed_at_5', found_instead=True)}" for k in kinds)]
        for name in names
    ]  # fmt: skip
    lines = [
        "Percent, mean over seeds, on training tiles kept apart with defects of another make; no "
        "test image was looked at. Image AUROC: also the difference to plain PatchCore in points "
        "with its 95 % interval over groups of images.",
        "",
        *ablate.markdown([heads, *rows]),
        "",
        "Image AUROC of each kind of defect, and the share of its images found when 5 % of the "
        "good ones are flagged:",
        "",
        *ablate.markdown([["candidate", *kinds], *by_kind]),
    ]
    files.write_text(evidence / "table.md", "\n".join(lines) + "\n")


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean(values))


def _rank(runs: list[dict]) -> float:
    """What candidates are ranked by; an undefined metric ranks last."""
    mean = _mean([run["metrics"][metric] for run in runs for metric in RANKED])
    return -1.0 if mean is None else mean


def _cell(found: dict, name: str, metric: str, images: list) -> str:
    mean = tables.percent(_mean([run["metrics"][metric] for run in found[name]]))
    if metric != "image_auroc" or name == BASE or BASE not in found:
        return mean
    scores = [{run["seed"]: run["scores"] for run in found[n]} for n in (name, BASE)]
    both = sorted(scores[0].keys() & scores[1].keys())
    if not both:
        return mean
    a, b = (np.array([own[seed] for seed in both]) for own in scores)
    aurocs = [
        np.mean([run["metrics"][metric] for run in found[n] if run["seed"] in both])
        for n in (name, BASE)
    ]
    low, high = ablate.over_groups(a, b, images) or (np.nan, np.nan)
    return f"{mean} ({100 * (aurocs[0] - aurocs[1]):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}])"


def _of_kind(runs: list[dict], kind: str, name: str, found_instead: bool = False) -> str:
    mean = _mean([run["kinds"].get(kind, {}).get(name) for run in runs])
    return tables.percent(1 - mean if found_instead and mean is not None else mean)


def _minutes(run: dict) -> float:
    return sum(run["facts"].get("seconds", {}).values()) / 60


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the fields of --config.<group>.<field>=<value>."""
    fields, rest = ablate.split_fields(argv)
    parser = argparse.ArgumentParser(
        prog="scripts/search.py", description="Search settings on training data alone."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write the set", allow_abbrev=False)
    maker.add_argument("--data_dir", required=True, help="where the records of magnetic_tile lie")
    maker.add_argument("--output", required=True, type=files.local_path, help="a new folder")
    maker.add_argument("--copies", type=int, default=2, help="defective images of each good one")
    maker.add_argument("--seed", type=int, default=0)
    maker.add_argument("--sheet", type=files.local_path, help="also write pictures to look at, PNG")
    runner = commands.add_parser("run", help="run and rank candidates", allow_abbrev=False)
    runner.add_argument("--set", required=True, type=files.local_path, help="what `make` wrote")
    for name in ("--workdir", "--evidence"):
        runner.add_argument(name, required=True, type=files.local_path)
    runner.add_argument("--candidates", default="all", help="names separated by commas, or all")
    runner.add_argument("--seeds", default="54")
    runner.add_argument("--jobs", type=int, default=1, help="runs at once")
    looker = commands.add_parser("look", help="test one, and note it", allow_abbrev=False)
    looker.add_argument("--candidate", required=True)
    looker.add_argument("--why", required=True, help="the reason for this look at test labels")
    for name in ("--workdir", "--looks"):
        looker.add_argument(name, required=True, type=files.local_path)
    looker.add_argument("--seed", type=int, default=54)
    arguments = parser.parse_args(rest)
    if fields and arguments.command == "make":
        parser.error(f"make takes no --config.{fields[0]}")
    return arguments, fields


def _make(arguments: argparse.Namespace) -> int:
    print(search_set.make(arguments.data_dir, arguments.output, arguments.copies, arguments.seed))
    if arguments.sheet:
        sheet = search_set.contact_sheet(arguments.output)
        files.write_bytes(arguments.sheet, cv2.imencode(".png", sheet[..., ::-1])[1].tobytes())
    return 0


def _run(arguments: argparse.Namespace, fields: list[str], start: Callable[..., int]) -> int:
    names = arguments.candidates.split(",")
    candidates = CANDIDATES if names == ["all"] else names
    if arguments.jobs < 1:
        raise ValueError(f"--jobs={arguments.jobs}: must be at least 1")
    if arguments.jobs > 1:  # each would take most of a GPU's memory when it starts
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    fields = [*fields, f"data.raw_dir={arguments.set}"]
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    failed = run(
        candidates, fields, seeds, arguments.workdir, arguments.evidence, arguments.jobs, start
    )
    print((arguments.evidence / "table.md").read_text(encoding="utf-8"))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _look(arguments: argparse.Namespace, fields: list[str], start: Callable[..., int]) -> int:
    metrics = look(
        *(arguments.candidate, fields, arguments.seed, arguments.workdir, arguments.looks),
        *(arguments.why, start),
    )
    print(", ".join(f"{name} {tables.percent(metrics[name])}" for name in METRICS))
    return 0


def main(
    argv: Sequence[str] | None = None, start: Callable[..., int] = ablate.start_program
) -> int:
    """Runs the command line; the exit status."""
    arguments, fields = parse(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.command == "make":
            return _make(arguments)
        return {"run": _run, "look": _look}[arguments.command](arguments, fields, start)
    except (ValueError, OSError) as e:
        print(f"error: {files.explain(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

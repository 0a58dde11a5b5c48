"""Kills a run at random moments, restarts it, and compares its result with an untouched run.

    python scripts/campaign.py --kills=100 --seed=0 --table=docs/reliability.md

A round is a fresh folder. The whole program, from raw pictures to the report, is started, killed
with SIGKILL and started again, up to five times, and then left to finish. Its files must equal
those of the untouched run bit for bit (see `result`). The phase of a kill is read off the run's log
and folder after its death. Moments and order come from the seed; the operating system adds its own.
The exit status is 1 if anything differs; the folder of such a round is kept.
"""

import argparse
import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np
import orbax.checkpoint as ocp
import tensorflow_datasets as tfds

ROOT = pathlib.Path(__file__).resolve().parent.parent
PHASES = ("data building", "training", "saving", "evaluating", "report writing")
PER_ROUND = 5
POLL_SECONDS = 0.005
MARKERS = ("<!-- campaign: begin -->", "<!-- campaign: end -->")

GOOD, BAD, EPOCHS, BATCH = 12, 4, 3, 8
STEPS = EPOCHS * 2  # a fifth of the good pictures is kept for the test, 10 train
FIELDS = (
    "data.raw_dir=../parts",
    "data.data_dir=records",
    "data.image_size=64,64",
    "data.resize=64,64",
    "teacher.name=resnet18",
    "teacher.weights=random",
    "student.size=",
    "student.width=24",
    "student.depth=2",
    "student.heads=3",
    "student.init=scratch",
    "student.layers=2,3",
    f"train.batch_size={BATCH}",
    f"train.epochs={EPOCHS}",
    "method.names=mmr",
    "eval.batch_size=8",
    "eval.bootstrap=20",
    "report.gallery=6",
    "ckpt.every_seconds=0",
)
RUN = pathlib.Path("run/mmr/parts/seed54")
RECORDS = pathlib.Path("records/folder/parts/1.0.0")
REMAINS = ("*.part", "*.building", "*orbax-checkpoint-tmp*")


@dataclasses.dataclass
class Launch:
    """One start of the program, until it ended or was killed."""

    status: int
    phase: str  # at the end
    seconds: float
    lost: float  # seconds since the last thing that a restart can use
    spans: dict[str, float]  # phase -> seconds spent in it


@dataclasses.dataclass
class Kill:
    """One kill and what became of its round."""

    round: int
    phase: str
    lost: float
    differing: list[str] | None = None  # None until the round is over


def draw_parts(folder: pathlib.Path) -> None:
    """Writes the raw data: 12 good pictures, 4 with a bright square and its mask."""
    rng = np.random.default_rng(0)
    for kind, count in (("good", GOOD), ("bad", BAD)):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            picture = np.clip(rng.normal(110, 12, (72, 88, 3)), 0, 255).astype(np.uint8)
            if kind == "bad":
                mask = np.zeros((72, 88), np.uint8)
                mask[20:36, 16 * i + 6 : 16 * i + 22] = 255
                picture[mask > 0] = 250 - picture[mask > 0] // 2
                cv2.imwrite(str(folder / kind / f"{i:02d}_mask.png"), mask)
            cv2.imwrite(str(folder / kind / f"{i:02d}.png"), picture)


def command() -> list[str]:
    """The command line of every launch; the working directory is the round's folder."""
    fields = [f"--config.{field}" for field in FIELDS]
    program = [sys.executable, "-m", "mmrjax.main"]
    return [*program, "--config=configs/folder.py", "--workdir=run", *fields]


def launch(home: pathlib.Path, aim: tuple[str, int, float] | None = None) -> Launch:
    """Starts the program in `home` and waits for its end, or kills it at `aim`.

    Args:
      home: the round's folder; the raw data lie beside it.
      aim: (phase, which entry into that phase, seconds after it, or its end if that comes first);
        None lets it finish.
    """
    home.mkdir(exist_ok=True)
    log = home / "log.txt"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    stale = saves_in_progress(home)
    with log.open("w") as out:
        process = subprocess.Popen(command(), cwd=home, env=environment, stderr=out, stdout=out)
    started = last_mark = last = time.monotonic()
    spans, entries = collections.Counter(), collections.Counter()
    now_in, kept, entered = "", usable(home), None
    while process.poll() is None:
        now, before = time.monotonic(), now_in
        now_in = phase(home, stale)
        spans[before] += now - last
        last = now
        if now_in != before:
            entries[now_in] += 1
        if (found := usable(home)) != kept:
            kept, last_mark = found, now
        if aim and entered is None and now_in == aim[0] and entries[now_in] == aim[1]:
            entered = now
        if entered is not None and (now_in != aim[0] or now - entered >= aim[2]):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(POLL_SECONDS)
    status, ended = process.wait(), time.monotonic()
    if usable(home) != kept:
        last_mark = ended
    return Launch(status, phase(home, stale), ended - started, ended - last_mark, dict(spans))


def saves_in_progress(home: pathlib.Path) -> set[str]:
    """Unfinished checkpoints; Orbax renames a finished one."""
    folder = home / RUN / "checkpoints" / "train"
    return {path.name for path in folder.glob("*") if not path.name.isdigit()}


def phase(home: pathlib.Path, stale: set[str]) -> str:
    """The phase of a run, from its log and folder; `stale` are saves that were killed before."""
    log = (home / "log.txt").read_text()
    if "report: " in log:
        return "after the report"
    if "image AUROC" in log or "finished before" in log:
        return "report writing"
    if "built in" in log or "up to date" in log:
        if (home / RUN / "checkpoints" / "train" / str(STEPS)).is_dir():
            return "evaluating"
        return "saving" if saves_in_progress(home) - stale else "training"
    return "data building" if "building the records" in log else "starting"


def usable(home: pathlib.Path) -> frozenset[str]:
    """The files that a restart can use: records, checkpoints, an evaluation, a report."""
    saved = (home / RUN / "checkpoints" / "train").glob("*")
    steps = {path.name for path in saved if path.name.isdigit()}
    files = (RECORDS / "fingerprint.json", RUN / "results.json", "run/report.html")
    return frozenset({str(name) for name in files if (home / name).exists()} | steps)


def result(home: pathlib.Path) -> dict[str, str]:
    """{name: digest} of everything in a finished run that must not depend on kills."""
    parts = records(home / RECORDS)
    with ocp.StandardCheckpointer() as checkpointer:
        folder = (home / RUN / "checkpoints" / "train" / str(STEPS) / "state").absolute()
        state = ocp.tree.to_flat_dict(checkpointer.restore(folder), sep="/")
    parts |= {f"checkpoint {name}": np.asarray(leaf).tobytes() for name, leaf in state.items()}
    run = home / RUN
    names = ["scores.csv", "curves.json", *(f"maps/{p.name}" for p in (run / "maps").iterdir())]
    parts |= {name: (run / name).read_bytes() for name in names}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts["metrics.jsonl"] = [(line["step"], line["loss"], line["lr"]) for line in lines]
    results = json.loads((run / "results.json").read_text())
    del results["facts"]["seconds"]
    parts |= {"results.json": results, "all results": (home / "run/results.json").read_bytes()}
    page = (home / "run/report.html").read_text()
    parts["report pictures"] = re.findall(r"data:image/webp;base64,[^\"]+", page)
    remains = [p for what in REMAINS for p in home.rglob(what)]
    parts["remains of killed writes"] = sorted(str(p.relative_to(home)) for p in remains)
    return {
        name: hashlib.sha256(part if isinstance(part, bytes) else repr(part).encode()).hexdigest()
        for name, part in parts.items()
    }


def records(folder: pathlib.Path) -> dict[str, str]:
    """Every field of every record, in the order of the files.

    The bytes of the files differ between processes, because Protocol Buffers draw the order of the
    fields of a record anew in every process.
    """
    builder = tfds.builder_from_directory(folder)
    raw = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    found = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split, decoders=raw)
        found |= {f"record {split} {i}": str(sorted(source[i].items())) for i in range(len(source))}
    return found


def differences(got: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Names of the entries that differ, or stand on one side only."""
    return sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))


def finish(home: pathlib.Path) -> Launch:
    """Lets the program run to its end; RuntimeError with its log when it fails."""
    done = launch(home)
    if done.status:
        raise RuntimeError(f"the run in {home} failed:\n{(home / 'log.txt').read_text()}")
    return done


def play_round(
    number: int, home: pathlib.Path, kills: int, spans: dict[str, float], seed: int
) -> list[Kill]:
    """Kills up to `kills` launches in `home`, in phases and moments of their own, then finishes."""
    rng = random.Random(f"{seed} {number}")
    done = []
    for wanted in sorted(rng.choices(PHASES, k=kills), key=PHASES.index):
        entry = rng.randint(1, 3) if wanted == "saving" else 1
        length = spans.get(wanted, 0.0) / (STEPS if wanted == "saving" else 1)
        killed = launch(home, (wanted, entry, rng.random() * length))
        if killed.status == -signal.SIGKILL:
            done.append(Kill(number, killed.phase, killed.lost))
        elif killed.status:
            raise RuntimeError(f"the run in {home} failed:\n{(home / 'log.txt').read_text()}")
    finish(home)
    return done


def campaign(
    kills: int, seed: int, work: pathlib.Path, spans: dict[str, float], say=print
) -> list[Kill]:
    """Plays rounds until there were `kills` kills.

    Args:
      kills: number of kills of all rounds.
      seed: draws phases and moments.
      work: holds parts/, and in untouched/ a finished run.
      spans: seconds that this run spent in each phase; moments are drawn from them.
      say: receives a line per kill.
    """
    wanted = result(work / "untouched")
    found: list[Kill] = []
    number = 0
    while len(found) < kills:
        number += 1
        home = work / f"round{number}"
        size = min(PER_ROUND, kills - len(found))
        played = play_round(number, home, size, spans, seed)
        differing = differences(result(home), wanted)
        for kill in played:
            kill.differing = differing
            say(f"round {number}: {kill.phase}, {kill.lost:.1f} s lost, {differing or 'equal'}")
        found += played
        if not differing:
            shutil.rmtree(home)
    return found


def table(kills: list[Kill], seconds: float, args: argparse.Namespace) -> str:
    """The Markdown table by phase, with how it was made."""
    lines = [
        f"`{shlex.join(['python', 'scripts/campaign.py', *sys.argv[1:]])}`, "
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()}-core {platform.machine()} "
        f"{platform.system()}, Python {platform.python_version()}, "
        f"jax {importlib.metadata.version('jax')} on CPU, seed {args.seed}; "
        f"{len({kill.round for kill in kills})} rounds; the untouched run takes {seconds:.1f} s.",
        "",
        "| phase at the kill | kills | result equal | not equal | seconds lost: mean | most |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*PHASES, *sorted({k.phase for k in kills} - {*PHASES}), "all"):
        own = [kill for kill in kills if name in (kill.phase, "all")]
        unequal = sum(bool(kill.differing) for kill in own)
        lost = [kill.lost for kill in own] or [0.0]
        lines.append(
            f"| {name} | {len(own)} | {len(own) - unequal} | {unequal} | "
            f"{sum(lost) / len(lost):.1f} | {max(lost):.1f} |"
        )
    return "\n".join(lines)


def write_between_markers(path: pathlib.Path, text: str) -> None:
    """Replaces what stands between the markers of a document."""
    begin, end = MARKERS
    head, _, rest = path.read_text().partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=pathlib.Path, help="a document with the markers")
    parser.add_argument("--work", type=pathlib.Path, help="a folder to work in; default: temporary")
    args = parser.parse_args()
    work = args.work or pathlib.Path(tempfile.mkdtemp(prefix="campaign-"))
    draw_parts(work / "parts")
    first = finish(work / "first")  # what is compiled once is kept in the user's cache
    untouched = finish(work / "untouched")
    spans = {name: min(first.spans.get(name, 0.0), untouched.spans[name]) for name in PHASES}
    print(f"untouched: {untouched.seconds:.1f} s, {spans}", flush=True)
    kills = campaign(args.kills, args.seed, work, spans)
    text = table(kills, untouched.seconds, args)
    print(text)
    if args.table:
        write_between_markers(args.table, text)
    if any(kill.differing for kill in kills):
        print(f"error: not everything is equal; see {work}", file=sys.stderr)
        return 1
    if args.work is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())

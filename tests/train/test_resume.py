"""Killed and resumed equals uninterrupted, bit for bit; SIGTERM saves and leaves.

A run here is the whole program, from raw pictures to the report. `pytest -m slow` kills more.
"""

import hashlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds

from mmrjax.runtime import logs

ROOT = pathlib.Path(__file__).resolve().parents[2]
EPOCHS = 3
STEPS = EPOCHS * 2  # a fifth of the twelve good pictures is kept for the test
FIELDS = (
    f"train.epochs={EPOCHS}",
    "method.names=mmr",
    "report.gallery=6",
    "ckpt.every_seconds=0",
)
Start = Callable[[pathlib.Path], subprocess.Popen]
RUN = pathlib.Path("run/mmr/parts/seed54")
CHECKPOINTS = RUN / "checkpoints" / "train"
RECORDS = pathlib.Path("records/folder/parts/1.1.0")
REMAINS = ("*.part", "*.building", "*orbax-checkpoint-tmp*")


def saves_in_progress(home: pathlib.Path) -> set[str]:
    """Unfinished checkpoints; Orbax renames a finished one."""
    return {path.name for path in (home / CHECKPOINTS).glob("*") if not path.name.isdigit()}


# {phase of a run: whether a run has reached it, from its folder, its log and the saves that were
# in progress before it began}
PHASES: dict[str, Callable[[pathlib.Path, str, set[str]], bool]] = {
    "data building": lambda home, log, old: "building the records" in log,
    "training": lambda home, log, old: "built in" in log or "up to date" in log,
    "saving": lambda home, log, old: bool(saves_in_progress(home) - old),
    "evaluating": lambda home, log, old: (home / CHECKPOINTS / str(STEPS)).is_dir(),
    "report writing": lambda home, log, old: "image AUROC" in log,
}


@pytest.fixture(scope="module")
def start(tiny_raw, tiny_fields) -> Start:
    """Starts the program in a round's folder."""
    fields = [*tiny_fields(tiny_raw, "records"), *(f"--config.{field}" for field in FIELDS)]
    program = [sys.executable, "-m", "mmrjax.main", "--config=configs/folder.py", "--workdir=run"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def run(home: pathlib.Path) -> subprocess.Popen:
        home.mkdir(exist_ok=True)
        with (home / "log.txt").open("w") as out:
            command = [*program, *fields]
            return subprocess.Popen(command, cwd=home, env=environment, stderr=out, stdout=out)

    return run


def kill(start: Start, home: pathlib.Path, phase: str, delay: float) -> bool:
    """Starts the program and kills it in a phase; whether it was still running then."""
    old = saves_in_progress(home)
    process = start(home)
    while process.poll() is None:
        if PHASES[phase](home, (home / "log.txt").read_text(), old):
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    status = process.wait()
    assert status in (0, -signal.SIGKILL), (home / "log.txt").read_text()
    return status != 0


def finish(start: Start, home: pathlib.Path) -> pathlib.Path:
    """Lets the program run to its end."""
    assert start(home).wait(timeout=300) == 0, (home / "log.txt").read_text()
    return home


def result(home: pathlib.Path) -> dict[str, str]:
    """{name: digest} of everything in a finished run that must not depend on kills."""
    parts = records(home / RECORDS)
    with ocp.StandardCheckpointer() as checkpointer:
        folder = (home / CHECKPOINTS / str(STEPS) / "state").absolute()
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
    fields = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split, decoders=raw)
        fields |= {
            f"record {split} {i}": str(sorted(source[i].items())) for i in range(len(source))
        }
    return fields


def differences(got: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Names of what is not equal, or only on one side."""
    return sorted(name for name in got.keys() | wanted.keys() if got.get(name) != wanted.get(name))


@pytest.fixture(scope="module")
def untouched(start, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished run that nobody disturbed."""
    return finish(start, tmp_path_factory.mktemp("kills") / "untouched")


def test_kills_while_building_saving_and_evaluating_change_nothing(start, untouched):
    home = untouched.parent / "killed"
    assert kill(start, home, "data building", 0.1)
    assert kill(start, home, "saving", 0.01)
    assert kill(start, home, "evaluating", 0.05)
    assert differences(result(finish(start, home)), result(untouched)) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_kills_at_random_moments_of_every_phase_change_nothing(start, untouched, seed):
    rng, home = random.Random(seed), untouched.parent / f"seed{seed}"
    killed = [kill(start, home, phase, rng.uniform(0, 1)) for phase in PHASES]
    assert sum(killed) >= 3
    assert differences(result(finish(start, home)), result(untouched)) == []


def test_sigterm_saves_and_the_next_start_goes_on_from_there(start, untouched):
    home = untouched.parent / "terminated"
    process = start(home)
    while not any((home / CHECKPOINTS).glob("[0-9]")):
        assert process.poll() is None, (home / "log.txt").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    last = (home / "log.txt").read_text().splitlines()[-1]
    step = int(last.removeprefix("stopped at step ").split()[0])
    assert last.endswith("saved; the same command continues")
    resumed = f"resuming at step {step} of" in (finish(start, home) / "log.txt").read_text()
    assert resumed == (step < STEPS)
    assert differences(result(home), result(untouched)) == []


def test_the_comparison_sees_a_flipped_bit_anywhere(untouched):
    wanted = result(untouched)
    for name in ("scores.csv", "maps/000_heat.png"):
        path = untouched / RUN / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert differences(result(untouched), wanted) == [name]
        path.write_bytes(content)


def test_a_torn_last_line_of_the_log_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    with logs.TrainLog(path, start=1, stop=2, steps_per_epoch=2, batch=4):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0]


def test_the_time_of_a_lost_log_is_unknown_and_damaged_lines_do_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert logs.seconds(path, 4, 0, 9) is None
    path.write_text('{"step": 0, "images_per_second": 2.0}\n{"step": 1, "imagfs": 2.0}\n[3]\n')
    assert logs.seconds(path, 4, 0, 9) == 2.0
    assert logs.seconds(path, 4, 1, 9) == 0.0

"""The same command on more devices or in two processes gives the same numbers.

One device is the reference; float32, the same global batch and seed. The processes are real ones
(jax.distributed on CPU); what each of them does is in two_processes.py.
"""

import csv
import functools
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from data_builders import build
from mmrjax import main
from mmrjax.runtime import mesh as mesh_lib
from mmrjax.runtime import processes

STEPS = 100
FIELDS = (
    "data.image_size=32,32",
    "data.resize=32,32",
    "student.depth=1",
    "student.layers=2",
    # Two rows on each of eight devices, as the paper's batch has; rows 11 to 16 are padding. With
    # one row, other kernels compute, and training amplifies what they round otherwise to 1e-5.
    "train.batch_size=16",
    "train.epochs=100",
    "train.seeds=1",
    "eval.save_maps=true",
)
SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")
spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
two_processes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(two_processes)


def on_devices(arguments: list[str], devices: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        limited = functools.partial(mesh_lib.make_mesh, devices)
        patch.setattr(mesh_lib, "make_mesh", limited)
        assert main.main(arguments) == 0


def start_two(devices: int, *arguments_of_each: list[str]) -> list[tuple[int, str, str]]:
    """Runs the script twice at once; [(status, standard output, standard error)]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    started = []
    for index, (role, *arguments) in enumerate(arguments_of_each):
        # -P: in the script's own folder, tests/data_builders would stand before ours.
        command = [sys.executable, "-P", str(SCRIPT), role, str(index), port, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes))
    try:
        said = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *streams) for p, streams in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def arguments(tiny_raw, tiny_fields, tmp_path_factory):
    """(work directory) -> command line; the records are shared."""
    records = tmp_path_factory.mktemp("records")

    def build(workdir: pathlib.Path, methods: str = "mmr") -> list[str]:
        fields = [f"--config.{field}" for field in (*FIELDS, f"method.names={methods}")]
        args = ["--config=configs/folder.py", f"--workdir={workdir}"]
        return [*args, *tiny_fields(tiny_raw, records), *fields]

    return build


@pytest.fixture(scope="module")
def reference(arguments, tmp_path_factory):
    """The work directory of both methods on one device."""
    workdir = tmp_path_factory.mktemp("one_device")
    on_devices(arguments(workdir, "mmr,patchcore"), 1)
    return workdir


@pytest.fixture(scope="module")
def two(arguments, tmp_path_factory):
    """(work directory, outcomes) of two processes, which build their own records."""
    home = tmp_path_factory.mktemp("two_processes")
    args = arguments(home / "run", "mmr,patchcore")
    args = [a for a in args if "data_dir" not in a] + [f"--config.data.data_dir={home / 'records'}"]
    return home / "run", start_two(1, ["program", *args], ["program", *args])


def folder(workdir, method="mmr"):
    return workdir / method / "parts" / "seed1"


def losses(workdir) -> np.ndarray:
    lines = [json.loads(line) for line in (folder(workdir) / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    return np.array([line["loss"] for line in lines])


def scores(workdir, method) -> dict[str, float]:
    with (folder(workdir, method) / "scores.csv").open(newline="") as file:
        return {row["id"]: float(row["score"]) for row in csv.DictReader(file)}


def swapped_pixels(workdir, other, method) -> dict[str, int]:
    """{image: neighbours in the order of its pixels' scores that are the other way round}."""
    first, second = (np.load(folder(w, method) / "maps" / "maps.npy") for w in (workdir, other))
    found = {}
    for name, a, b in zip(scores(workdir, method), first, second, strict=True):
        order = np.argsort(a.ravel(), kind="stable")
        found[name] = int((np.diff(b.ravel()[order]) < 0).sum())
    return {name: count for name, count in found.items() if count}


def assert_same_results(workdir, other, method) -> None:
    """Scores and maps within 1e-5, metrics within 1e-6 or the images whose pixels swap ranks."""
    first, second = scores(workdir, method), scores(other, method)
    assert first.keys() == second.keys()
    np.testing.assert_allclose([*second.values()], [*first.values()], rtol=0, atol=1e-5)
    maps = [np.load(folder(w, method) / "maps" / "maps.npy") for w in (workdir, other)]
    np.testing.assert_allclose(*maps, rtol=0, atol=1e-5)
    results = [
        json.loads((folder(w, method) / "results.json").read_text()) for w in (workdir, other)
    ]
    values = [r["metrics"]["folder/parts"]["all"] for r in results]
    differ = {
        name: values[1][name] - value
        for name, value in values[0].items()
        if isinstance(value, float) and abs(values[1][name] - value) > 1e-6
    }
    swaps = swapped_pixels(workdir, other, method)
    if differ:
        print(f"{method}: {differ}, because pixels swap ranks: {swaps}")  # pytest -rP shows it
    assert swaps or not differ, differ
    # Images lie further apart than rounding errors.
    assert not differ.keys() & {"image_auroc", "image_ap", "image_f1_max"}


@pytest.mark.parametrize(
    "devices",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 8],
)
def test_the_number_of_devices_changes_no_result(arguments, reference, tmp_path, devices):
    on_devices(arguments(tmp_path / "run"), devices)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(reference), rtol=0, atol=1e-5)
    assert_same_results(reference, tmp_path / "run", "mmr")


def test_two_processes_give_what_one_gives(reference, two):
    workdir, outcomes = two
    assert [status for status, _, _ in outcomes] == [0, 0], outcomes
    np.testing.assert_allclose(losses(workdir), losses(reference), rtol=0, atol=1e-5)
    for method in ("mmr", "patchcore"):
        assert_same_results(reference, workdir, method)


def test_only_the_first_process_writes_files_and_prints_the_table(two):
    workdir, outcomes = two
    home = str(workdir.parent)
    # Orbax is called by both and writes what they hold.
    shared = [
        str(folder(workdir) / "checkpoints" / "train"),
        str(folder(workdir, "patchcore") / "fitted"),
    ]
    written = []
    for _, output, _ in outcomes:
        line = next(line for line in output.splitlines() if line.startswith("WRITTEN "))
        paths = json.loads(line.removeprefix("WRITTEN "))
        written.append([p for p in paths if p.startswith(home) and not p.startswith(tuple(shared))])
    assert len(written[0]) > 10
    assert written[1] == []
    assert ["image_auroc" in output for _, output, _ in outcomes] == [True, False]


@pytest.fixture(scope="module")
def parts(tiny_raw, tmp_path_factory):
    """(what the two processes saw, their outcomes, their folder)."""
    home = tmp_path_factory.mktemp("parts")
    records = build.build("folder", tiny_raw, home / "records", log=lambda line: None)["parts"]
    outcomes = start_two(2, *[["parts", home, records]] * 2)
    files = [home / f"seen{index}.json" for index in range(2)]
    assert all(file.exists() for file in files), outcomes
    return [json.loads(file.read_text()) for file in files], outcomes, home


def test_what_the_first_process_says_or_fails_with_reaches_all(parts):
    for seen in parts[0]:
        assert seen["said by the first"] == {"index": 0, "list": [1, [2, 3]]}
        assert "no number" in seen["error"]


def test_processes_agree_on_the_largest_numbers(parts):
    assert [seen["agreed"] for seen in parts[0]] == [[10, 5], [10, 5]]


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_each_process_decodes_only_its_share_and_all_see_the_same_batches(parts, mode):
    first, second = (seen[mode] for seen in parts[0])
    assert first["batches"] == second["batches"] == parts[0][0]["resident"]["batches"]
    assert first["canvas"] == second["canvas"]
    assert [seen["own"] for seen in parts[0]] == [[0, 1], [2, 3]]  # of every batch of four
    if mode == "resident":
        assert not set(first["decoded"]) & set(second["decoded"])
        assert len(first["decoded"] + second["decoded"]) == 10  # all images, once
    else:
        assert len(first["decoded"]) == len(second["decoded"]) == 6  # half of three batches


def test_maps_are_counted_by_all_processes_together(parts):
    alone = two_processes.count_pixels(mesh_lib.make_mesh(1))
    for seen in parts[0]:
        assert seen["histograms"].keys() == alone.keys()
        for name, bounds in alone.items():
            assert seen["histograms"][name] == pytest.approx(bounds, abs=1e-12)


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_run_goes_on(parts):
    first, second = (seen["training"] for seen in parts[0])
    assert first["stopped"] == second["stopped"] == ["stopped at step 6 of 12, saved", 15]
    assert first["sums"] == second["sums"]
    steps = [json.loads(line)["step"] for line in (parts[2] / "run" / "metrics.jsonl").open()]
    assert steps == list(range(12))


def test_arrays_split_over_processes_are_saved_and_a_damaged_save_is_passed_over_by_all(parts):
    for seen in parts[0]:
        assert seen["checkpoint"] == {
            "step": 3,
            "same": True,
            "mine": [[256, 256], [256, 256]],  # of [512, 256]
            "left": [3],
        }


def test_a_process_that_fails_alone_ends_the_other_one_too(parts):
    (first, _, said), (second, _, _) = parts[1]
    assert (first, second) == (1, 3), parts[1]
    assert "processes.agree(1)" in said  # the traceback: it waited for the other one


# --- the command line


def test_distributed_alone_leaves_it_to_environment_and_cluster(monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: joined.append(args))
    monkeypatch.setattr(jax.config, "update", lambda *args: None)
    _, given = main.parse(["--config=configs/folder.py", "--workdir=x", "--distributed"])
    processes.initialize(given.coordinator, given.num_processes, given.process_id)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    processes.initialize(None, None, None)
    processes.initialize(None, None, 0)
    assert joined == [(None, None, None), ("host:1", 4, 3), ("host:1", 4, 0)]


@pytest.mark.parametrize("flag", ["--coordinator=host:1", "--num_processes=2", "--process_id=0"])
def test_each_of_the_flags_means_distributed(flag):
    base = ["--config=configs/folder.py", "--workdir=x"]
    assert not main.parse(base)[1].distributed
    assert main.parse([*base, flag])[1].distributed


def test_a_machine_that_is_no_cluster_says_what_to_give(tmp_path):
    command = [sys.executable, "-m", "mmrjax.main", "--config=configs/folder.py", "--distributed"]
    done = subprocess.run([*command, f"--workdir={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--coordinator=host:port --num_processes=N --process_id=K" in line

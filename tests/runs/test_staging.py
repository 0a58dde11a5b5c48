"""A work directory in a bucket: as good as a folder, on any machine, and after any kill.

The clients are the real ones (gcsfs, google-cloud-storage, TensorStore); gcs_server.py answers.
"""

import json
import logging as std_logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import logging

import mmrjax
from mmrjax import compare, convert, main
from mmrjax.export import __main__ as export
from mmrjax.predict import __main__ as predict
from mmrjax.report import __main__ as report
from mmrjax.runs import staging
from mmrjax.weights import source

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = "mmr/parts/seed1"
FIELDS = (
    "method.names=mmr,patchcore",
    "train.seeds=1",
    "calibration.fraction=0.5",
    "calibration.target_fpr=0.2",
    "ckpt.every_seconds=0",
    "eval.save_maps=true",
)
CLOCKS = ("images_per_second", "time", "seconds", "command")


# --- the folder that stands for an address


@pytest.fixture
def place(bucket, request):
    """(address, its content as text) of a folder of its own."""
    address, objects = bucket
    own = f"{request.node.name}/"

    def content() -> dict[str, str]:
        return {
            name.removeprefix(own): data.decode()
            for name, (data, _) in sorted(objects.items())
            if name.startswith(own)
        }

    return f"{address}/{own}", content


def test_what_is_written_is_there_for_the_next_command(place):
    address, content = place
    with staging.opened(address) as stage:
        folder = stage.folder
        (folder / "a").mkdir()
        (folder / "a" / "x.json").write_text("1")
        (folder / "b.txt").write_text("2")
        (folder / "half.txt.part").write_text("never sent")
    assert content() == {"a/x.json": "1", "b.txt": "2"}
    assert not folder.exists()
    with staging.opened(address) as stage:
        folder = stage.folder
        assert (folder / "a" / "x.json").read_text() == "1"
        (folder / "b.txt").unlink()
    assert content() == {"a/x.json": "1"}


def test_only_what_has_changed_is_sent_the_oldest_first(place, bucket):
    address, _ = place
    numbers = lambda: {name.rpartition("/")[2]: n for name, (_, n) in bucket[1].items()}  # noqa: E731
    with staging.opened(address) as stage:
        folder = stage.folder
        for age, name in enumerate(("c", "a", "b")):
            (folder / name).write_text("1")
            os.utime(folder / name, ns=(age, age))
        stage.send()
        first = numbers()
        assert first["c"] < first["a"] < first["b"]
        (folder / "a").write_text("2")
        stage.send()
        assert numbers()["a"] > first["a"]
        assert numbers() | {"a": first["a"]} == first


def test_checkpoints_and_maps_stay_in_the_bucket(place):
    address, content = place
    left = (
        "s/checkpoints/train/3/d",
        "s/fitted/0/d",
        "s/checkpoints/train-damaged-4/d",
        "s/maps/maps.npy",
    )
    with staging.opened(address) as stage:
        folder = stage.folder
        for name in (*left, "s/maps/gallery.json", "checkpoints.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("1")
    with staging.opened(address) as stage:
        folder = stage.folder
        found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert found == {"s/maps/gallery.json", "checkpoints.txt"}
        assert str(stage.store(folder / "s").root) == f"{address}s"
    assert {*left} < {*content()}


def test_who_only_reads_gets_what_it_asked_for_and_sends_nothing(place):
    address, content = place
    with staging.opened(address) as stage:
        folder = stage.folder
        (folder / "a.json").write_text("1")
        (folder / "b.csv").write_text("2")
    with staging.opened(address, ".json") as stage:
        folder = stage.folder
        assert [path.name for path in folder.iterdir()] == ["a.json"]
        (folder / "a.json").write_text("3")
    assert content() == {"a.json": "1", "b.csv": "2"}


def test_an_error_loses_nothing_and_names_the_address(place):
    address, content = place

    def work() -> None:
        with staging.opened(address) as stage:
            folder = stage.folder
            (folder / "a.json").write_text("1")
            raise ValueError(f"{folder}/a.json is wrong")

    with pytest.raises(ValueError, match="is wrong") as error:
        work()
    assert content() == {"a.json": "1"}
    assert str(error.value) == f"{address}a.json is wrong"


def test_log_lines_and_errors_of_the_system_name_the_address(place):
    address, _ = place
    handler, lines = logging.get_absl_handler(), []
    before = list(handler.filters)

    def work() -> None:
        with staging.opened(address) as stage:
            path = stage.folder / "absent"
            line = std_logging.makeLogRecord({"msg": "%s: slow", "args": (path,), "levelno": 30})
            handler.filter(line)
            lines.append(line.getMessage())
            path.read_text()

    with pytest.raises(FileNotFoundError, match=f"'{address}absent'"):
        work()
    assert lines == [f"{address}absent: slow"]
    assert handler.filters == before


def test_a_name_that_leads_out_of_the_folder_is_refused(place, bucket):
    address, _ = place
    own = address.removeprefix(bucket[0]).strip("/")
    bucket[1][f"{own}/../../evil.json"] = (b"1", 1)
    with pytest.raises(ValueError, match="leads out of a folder"), staging.opened(address):
        pass
    del bucket[1][f"{own}/../../evil.json"]
    for wrong in ("gs://a/../b", "gs://", "gs://a//b", "gs:/a/b", "s3://a/b"):
        with pytest.raises(ValueError, match="expected a folder here, or gs://"):
            staging.opened(wrong).__enter__()


def test_a_folder_is_used_as_it_is(tmp_path):
    with staging.opened(str(tmp_path)) as stage:
        assert stage.folder == tmp_path
        assert stage.store(tmp_path / "run").root == tmp_path / "run"
        stage.send()
    assert tmp_path.is_dir()


# --- whole programs


def arguments(workdir, fields) -> list[str]:
    own = [f"--config.{field}" for field in FIELDS]
    return ["--config=configs/folder.py", f"--workdir={workdir}", *fields, *own]


def kill_after_a_checkpoint(args: list[str], objects: dict) -> None:
    """Runs the program in another process, which is killed once step 2 is saved."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "mmrjax.main", *args]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        while f"runs/{RUN}/checkpoints/train/2/commit_success.txt" not in objects:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def said() -> list[str]:
    """The log lines of the programs in this module."""
    return []


@pytest.fixture(scope="module")
def trained(bucket, tiny_raw, tiny_fields, tmp_path_factory, said):
    """(work directory in the bucket, folder) of the same runs: one was killed, the other was not.

    The killed one goes on where nothing is left of it but the bucket, not even the raw pictures.
    """
    address, objects = bucket
    args = arguments(f"{address}/runs", tiny_fields(tiny_raw, f"{address}/records"))
    kill_after_a_checkpoint(args, objects)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMRJAX_CACHE", str(tmp_path_factory.mktemp("another_machine")))
        handler = std_logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.get_absl_logger().addHandler(handler)
        assert main.main([arg for arg in args if "raw_dir" not in arg]) == 0
        logging.get_absl_logger().removeHandler(handler)
    home = tmp_path_factory.mktemp("untouched")
    assert main.main(arguments(home / "runs", tiny_fields(tiny_raw, home / "records"))) == 0
    return f"{address}/runs", home / "runs"


@pytest.fixture(scope="module")
def read(trained, bucket):
    """(name) -> what both have of a file: (in the bucket, in the folder)."""
    _, home = trained
    return lambda name: (bucket[1][f"runs/{name}"][0], (home / name).read_bytes())


def without_clocks(content):
    """JSON without what differs from run to run."""
    if isinstance(content, dict):
        return {k: without_clocks(v) for k, v in content.items() if k not in CLOCKS}
    return content


def test_the_killed_run_went_on_from_its_checkpoint(read, said):
    found, expected = (
        [without_clocks(json.loads(line)) for line in text.splitlines()]
        for text in read(f"{RUN}/metrics.jsonl")
    )
    assert [line["step"] for line in found] == list(range(len(expected)))
    assert found == expected
    assert any(line.startswith("resuming at step") for line in said)


@pytest.mark.parametrize("method", ["mmr", "patchcore"])
def test_its_results_equal_those_of_an_untouched_run_in_a_folder(read, trained, method):
    _, home = trained
    own = f"{method}/parts/seed1"
    names = ["scores.csv", "curves.json", "calibration.json"]
    names += [p.relative_to(home / own).as_posix() for p in (home / own / "maps").iterdir()]
    assert "maps/maps.npy" in names
    for name in names:
        found, expected = read(f"{own}/{name}")
        assert found == expected, name
    found, expected = (without_clocks(json.loads(text)) for text in read(f"{own}/results.json"))
    assert found == expected


def test_repeating_the_command_redoes_nothing(trained, bucket, tiny_raw, tiny_fields, capfd):
    address, objects = bucket
    before = {name: n for name, (_, n) in objects.items() if "/parts/" in name}
    assert main.main(arguments(trained[0], tiny_fields(tiny_raw, f"{address}/records"))) == 0
    assert {name: n for name, (_, n) in objects.items() if name in before} == before
    said = capfd.readouterr()
    assert f"report: {address}/runs/report.html" in said.out
    assert "mmrjax-" not in said.out + said.err  # no name of the temporary folder


def test_a_damaged_checkpoint_in_the_bucket_is_set_aside(trained, bucket, tiny_raw, tiny_fields):
    address, objects = bucket
    kept = {name: value for name, value in objects.items() if name.startswith(f"runs/{RUN}/")}
    steps = sorted({int(name.split("/")[6]) for name in kept if "/checkpoints/train/" in name})
    newest = f"runs/{RUN}/checkpoints/train/{steps[-1]}/"
    name = max((n for n in kept if n.startswith(newest)), key=lambda n: len(kept[n][0]))
    data = bytearray(kept[name][0])
    data[len(data) // 2] ^= 1
    objects[name] = (bytes(data), kept[name][1] + 1)
    del objects[f"runs/{RUN}/results.json"]
    assert main.main(arguments(trained[0], tiny_fields(tiny_raw, f"{address}/records"))) == 0
    aside = f"runs/{RUN}/checkpoints/train-damaged-{steps[-1]}/"
    assert sum(n.startswith(aside) for n in objects) == sum(n.startswith(newest) for n in kept)
    scores = f"runs/{RUN}/scores.csv"
    assert objects[scores][0] == kept[scores][0]


def test_predict_scores_as_the_folder_does(trained, tiny_raw, tmp_path):
    rows = []
    for name, workdir in zip(("bucket", "folder"), trained, strict=True):
        args = [f"--workdir={workdir}/patchcore/parts/seed1", f"--input={tiny_raw / 'bad'}"]
        assert predict.main([*args, f"--output={tmp_path / name}"]) == 0
        rows.append((tmp_path / name / "scores.csv").read_bytes())
    assert rows[0] == rows[1]


def test_load_takes_an_address(trained, tiny_raw):
    path = tiny_raw / "bad" / "00.png"
    found, expected = (mmrjax.load(f"{w}/{RUN}").predict([path])[0] for w in trained)
    assert found.score == expected.score
    assert found.threshold == expected.threshold
    np.testing.assert_array_equal(found.map, expected.map)


def test_report_is_written_again_in_the_bucket(trained, bucket, capsys):
    _, objects = bucket
    expected = objects.pop("runs/report.html")[0]
    assert report.main([f"--workdir={trained[0]}"]) == 0
    assert objects["runs/report.html"][0] == expected
    assert capsys.readouterr().out.strip() == f"{trained[0]}/report.html"


def test_compare_pairs_runs_wherever_they_lie(trained, capsys):
    said = []
    for first, second in (trained, trained[1:] * 2):
        assert compare.main([f"{first}/mmr/parts", f"{second}/patchcore/parts"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_convert_takes_student_and_file_out_of_the_bucket(trained, bucket, tmp_path):
    for name, workdir in zip("ab", trained, strict=True):
        args = ["to-torch", "--kind=mmr", f"--input={workdir}/{RUN}"]
        assert convert.main([*args, f"--output={tmp_path / name}.safetensors"]) == 0
    (found, facts), (expected, same) = (source.read(tmp_path / f"{n}.safetensors") for n in "ab")
    assert facts == same
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)
    args = ["from-torch", "--kind=mmr", f"--output={tmp_path / 'c.safetensors'}"]
    bucket[1]["weights/a.safetensors"] = ((tmp_path / "a.safetensors").read_bytes(), 1)
    assert convert.main([*args, f"--input={bucket[0]}/weights/a.safetensors"]) == 0


def test_export_reads_the_bucket(trained, tmp_path):
    pytest.importorskip("flatbuffers", reason="needs the extra `export`")
    args = [f"--workdir={trained[0]}/patchcore/parts/seed1", f"--output={tmp_path / 's.jax'}"]
    assert export.main(args) == 0
    assert (tmp_path / "s.jax").stat().st_size > 0


# --- buckets that cannot be used


@pytest.fixture
def programs(tiny_raw, tiny_fields, tmp_path):
    """(name, address) -> the exit status of a program that is given it."""

    def call(name: str, address: str) -> int:
        fields = tiny_fields(tiny_raw, tmp_path / "records")
        if name == "main":
            return main.main(arguments(f"{address}/runs", fields))
        if name == "records":
            fields = tiny_fields(tiny_raw, f"{address}/records")
            return main.main(arguments(tmp_path / "runs", fields))
        if name == "report":
            return report.main([f"--workdir={address}/runs"])
        if name == "compare":
            return compare.main([f"{address}/runs/mmr/parts", f"{address}/runs/mmr/parts"])
        suffix = "jax" if name == "export" else "safetensors"
        out = f"--output={tmp_path / 'out'}.{suffix}"
        if name == "convert":
            return convert.main(["to-torch", "--kind=mmr", f"--input={address}/runs/{RUN}", out])
        program = {"predict": predict, "export": export}[name]
        more = [f"--input={tiny_raw}"] if name == "predict" else []
        return program.main([f"--workdir={address}/runs/{RUN}", out, *more])

    return call


ALL = ("main", "records", "report", "compare", "convert", "predict", "export")


def the_line(capfd) -> str:
    """The one error line, which is the last; no stack, no chatter of a library."""
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert said.splitlines()[-1] == line
    return line


@pytest.mark.parametrize("name", ALL)
def test_a_bucket_that_does_not_exist_is_one_line(bucket, programs, name, capfd, tmp_path):
    assert programs(name, "gs://nobody-has-this") == 1
    line = the_line(capfd)
    assert "gs://nobody-has-this/r" in line
    assert "there is no bucket 'nobody-has-this', or you may not see it" in line
    assert not (tmp_path / "runs" / "mmr").exists()


@pytest.mark.parametrize("name", ALL)
def test_a_bucket_without_the_right_to_it_is_one_line(
    bucket, storage, programs, name, capfd, monkeypatch
):
    monkeypatch.setattr(storage, "fail", lambda *request: 403)
    assert programs(name, bucket[0]) == 1
    line = the_line(capfd)
    assert f"{bucket[0]}/r" in line
    assert "log in with gcloud auth application-default login" in line


@pytest.mark.parametrize("name", ALL)
def test_without_the_package_the_line_says_what_to_install(programs, name, capfd, monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    def absent(*_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    assert programs(name, "gs://shop") == 1
    assert "gcsfs to access Google Storage: pip install 'mmrjax[gcs]'" in the_line(capfd)


def while_saving(method: str, path: str, body: bytes) -> bool:
    """Orbax's own small files beside the arrays."""
    return method == "POST" and b"fitted/0" in body


def while_sending(method: str, path: str, body: bytes) -> bool:
    """After the checkpoint, among the results."""
    return method == "POST" and b"curves.json" in body


@pytest.mark.parametrize("lost", [while_saving, while_sending])
def test_a_bucket_that_is_lost_on_the_way_ends_in_one_line(
    bucket, storage, tiny_raw, tiny_fields, tmp_path, capfd, monkeypatch, lost
):
    """The content of the bucket stays, and the same command continues."""
    address, objects = bucket
    args = arguments(f"{address}/{lost.__name__}", tiny_fields(tiny_raw, tmp_path / "records"))
    args.append("--config.method.names=patchcore")
    monkeypatch.setattr(storage, "fail", lambda *request: 403 if lost(*request) else None)
    assert main.main(args) == 1
    line = the_line(capfd)
    assert f"error: {address}/{lost.__name__}" in line
    assert "the roles storage.objectUser and storage.legacyBucketReader on it" in line
    saved = f"{lost.__name__}/patchcore/parts/seed1/fitted/0/commit_success.txt" in objects
    assert saved == (lost is while_sending)
    monkeypatch.setattr(storage, "fail", None)
    assert main.main(args) == 0
    assert f"{lost.__name__}/report.html" in objects

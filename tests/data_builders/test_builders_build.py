"""Building: what is fresh is reused, what is stale or half done is built again."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from data_builders import build, common, store

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def raw_dir(tmp_path, write_image, write_mask):
    root = tmp_path / "raw"
    for name in ("train/good/0", "train/good/1", "test/good/0", "test/bent/0"):
        write_image(root / "bottle" / f"{name}.png")
    write_mask(root / "bottle/ground_truth/bent/0_mask.png")
    return root


@pytest.fixture
def run(raw_dir, tmp_path):
    """Builds the small MVTec AD; returns the record directory of `bottle` and the log."""

    def call(raw=raw_dir, **kwargs):
        log = []
        record_dirs = build.build("mvtec_ad", raw, tmp_path / "data", log=log.append, **kwargs)
        return record_dirs["bottle"], "\n".join(log)

    return call


def written(record_dir: pathlib.Path) -> dict[str, int]:
    """When each file was written: differs after a rebuild, even of equal content."""
    return {p.name: p.stat().st_ino for p in record_dir.iterdir()}


def test_records_lie_where_the_contract_says(run, tmp_path):
    record_dir, log = run()
    assert record_dir == tmp_path / "data" / "mvtec_ad" / "bottle" / "1.0.0"
    assert "building the records from" in log
    assert "train good 2/209" in log
    kinds = {p.name.split("-0")[0] for p in record_dir.glob("*.array_record*")}
    assert kinds == {"mvtec_ad-train.array_record", "mvtec_ad-test.array_record"}


def test_fresh_records_are_reused(run):
    record_dir, _ = run()
    before = written(record_dir)
    _, log = run()
    assert written(record_dir) == before
    assert "up to date" in log


def test_what_a_build_killed_at_its_very_end_leaves_is_removed(run):
    record_dir, _ = run()
    before = written(record_dir)
    left = record_dir.parents[1] / ".bottle.building"
    left.mkdir()
    run()
    assert not left.exists()
    assert written(record_dir) == before


@pytest.mark.parametrize("change", ["added", "removed", "resized"])
def test_changed_raw_data_is_rebuilt_with_one_notice(run, raw_dir, write_image, change):
    record_dir, _ = run()
    before = written(record_dir)
    if change == "added":
        write_image(raw_dir / "bottle/train/good/2.png")
    elif change == "removed":
        (raw_dir / "bottle/train/good/1.png").unlink()
    else:
        write_image(raw_dir / "bottle/train/good/1.png", size_hw=(40, 40))
    _, log = run()
    assert not set(written(record_dir).values()) & set(before.values())
    assert log.count("the raw data changed since") == 1
    assert "up to date" in run()[1]


def test_category_is_not_rebuilt_when_another_one_changes(run, raw_dir, write_image):
    record_dir, _ = run()
    before = written(record_dir)
    write_image(raw_dir / "cable/train/good/0.png")
    run()
    assert written(record_dir) == before


def test_other_schema_is_rebuilt_or_refused_without_raw_data(run, monkeypatch):
    run()
    monkeypatch.setattr(common, "SCHEMA_VERSION", 2)
    with pytest.raises(FileNotFoundError, match=r"follow schema 1, .* needs 2, .*mvtec\.com"):
        run(raw=None)
    record_dir, log = run()
    assert "schema 1 became 2" in log
    assert store.read_fingerprint(record_dir)["schema"] == 2


def test_records_serve_without_raw_data(run, tmp_path):
    record_dir, _ = run()
    for raw in (None, tmp_path / "nowhere"):
        found, log = run(raw=raw)
        assert found == record_dir
        assert "no raw data at hand" in log


def test_killed_build_is_not_taken_for_finished(run, tmp_path):
    record_dir, _ = run()
    home = tmp_path / "data/mvtec_ad"
    half = home / ".bottle.building/mvtec_ad/bottle/incomplete.ABC_1.0.0"
    half.mkdir(parents=True)
    record_dir.rename(half / "1.0.0")
    with pytest.raises(FileNotFoundError, match="no records in"):
        run(raw=None)
    _, log = run()
    assert "building the records" in log
    assert [p.name for p in home.iterdir() if not p.name.endswith(".lock")] == ["bottle"]


@pytest.mark.parametrize("lost", ["fingerprint.json", "dataset_info.json"])
def test_records_that_lack_a_file_are_built_again(run, lost):
    record_dir, _ = run()
    (record_dir / lost).unlink()
    with pytest.raises(FileNotFoundError, match="no records in"):
        run(raw=None)
    run()
    assert (record_dir / lost).is_file()


def test_failed_rebuild_keeps_the_old_records(run, raw_dir):
    record_dir, _ = run()
    before = written(record_dir)
    image = raw_dir / "bottle/train/good/1.png"
    image.write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"bottle/train/good/1\.png: the image is damaged \(.*\)"):
        run()
    assert written(record_dir) == before
    assert not list(record_dir.parents[1].glob(".*.building"))


def test_second_process_waits_and_reuses(run, tmp_path):
    record_dir, _ = run()
    stored = json.loads((record_dir / "fingerprint.json").read_text())
    (record_dir / "fingerprint.json").write_text(json.dumps(stored | {"fingerprint": "old"}))
    with (tmp_path / "data/mvtec_ad/.bottle.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        logs = []
        other = threading.Thread(target=lambda: logs.append(run()[1]))
        other.start()
        other.join(timeout=1.0)
        assert other.is_alive(), "it must wait for the lock"
        # The first process finishes: the records are fresh now.
        (record_dir / "fingerprint.json").write_text(json.dumps(stored))
    other.join(timeout=30)
    assert "waiting for another process" in logs[0]
    assert "up to date" in logs[0]


def test_unknown_names_are_refused_with_what_there_is(run, raw_dir, tmp_path):
    with pytest.raises(ValueError, match=r"unknown data set 'vista'; available: \['aebad'"):
        build.build("vista", raw_dir, tmp_path)
    with pytest.raises(ValueError, match=r"unknown category 'vase'; available: \['bottle'"):
        run(categories=["vase"])


def test_missing_raw_folder_says_where_to_get_the_data(run, raw_dir, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist\. Get .*mvtec\.com.*bottle"
    ):
        run(raw=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has not the layout expected; it holds: no"):
        run(raw=tmp_path / "empty")
    (tmp_path / "mvtec.tar.xz").write_bytes(b"packed")
    with pytest.raises(ValueError, match=r"mvtec\.tar\.xz is a file; unpack it"):
        run(raw=tmp_path / "mvtec.tar.xz")


def test_counts_name_what_differs_from_the_published_ones():
    line = store.describe_counts({"train good": 2, "test good": 1, "odd": 5}, {"train good": 2})
    assert line == "found/expected: train good 2/2, odd 5, test good 1"
    line = store.describe_counts({"train good": 2}, {"train good": 3, "test good": 1})
    assert line.endswith("DIFFERS from the published one in: train good, test good")
    assert store.describe_counts({"a": 1}, {}) == "found: a 1"


def cli(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data_builders.build", *map(str, args)],
        cwd=ROOT, env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_command_line_builds_and_says_what_it_found(raw_dir, tmp_path):
    args = ("mvtec_ad", f"--raw_dir={raw_dir}", f"--data_dir={tmp_path / 'out'}")
    done = cli(*args, "--category=bottle")
    assert done.returncode == 0, done.stderr
    assert "mvtec_ad/bottle: found/expected: train good 2/209" in done.stdout
    assert (tmp_path / "out/mvtec_ad/bottle/1.0.0/dataset_info.json").is_file()


def test_command_line_answers_bad_input_with_one_message(tmp_path):
    done = cli("mvtec_ad", f"--raw_dir={tmp_path / 'no'}", f"--data_dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: mvtec_ad: no records in")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""

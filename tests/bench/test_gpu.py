"""scripts/bench_gpu.sh with a pretended bench: nothing of what was measured is lost."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "bench_gpu.sh"
# Writes its file and ends with the status that a file named after the part holds; "wait" waits.
PYTHON = """#!/usr/bin/env bash
[ "$1" != - ] || exec {python} "$@"
for argument; do case "$argument" in --json=*) file="${{argument#--json=}}" ;; esac; done
part="$(basename "$file" .part)"
echo "$part $XLA_FLAGS" >>{folder}/calls
echo '{{"part": "'"$(cat {folder}/measured 2>/dev/null || echo "$part")"'"}}' >"$file"
status="$(cat {folder}/"$part" 2>/dev/null || echo 0)"
[ "$status" != wait ] || {{ touch {folder}/waiting; exec sleep 60; }}
exit "$status"
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the script: (exit status, bench.json, parts that were called)."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(PYTHON.format(python=sys.executable, folder=tmp_path))
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("XLA_FLAGS", raising=False)

    def run(**environment):
        (tmp_path / "calls").write_text("")
        command = [SCRIPT, tmp_path / "out"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        found = json.loads((tmp_path / "out" / "bench.json").read_text())
        return done, found, (tmp_path / "calls").read_text().splitlines()

    run.folder = tmp_path
    return run


def test_one_call_measures_all_and_puts_it_together(bench):
    done, found, calls = bench()
    assert done.returncode == 0
    assert found.pop("incomplete") == []
    parts = [call.split()[0] for call in calls]
    assert parts[0] == "warm_up"
    assert set(found) == set(parts[1:])
    assert all(part == one["part"] for part, one in found.items())
    untuned = [call for call in calls if "autotune_level=0" in call]
    assert [call.split()[0] for call in untuned] == ["whole_run_untuned"]


def test_the_next_call_measures_what_is_missing_alone(bench):
    (bench.folder / "versus_train").write_text("3")
    done, found, _ = bench()
    assert done.returncode == 3
    assert found["incomplete"] == ["versus_train"]
    assert found["versus_train"] == {"part": "versus_train"}  # as far as it came
    assert "whole_run_warm" in found
    (bench.folder / "versus_train").write_text("4")
    (bench.folder / "measured").write_text("less")
    done, found, _ = bench()
    assert done.returncode == 4
    assert found["versus_train"] == {"part": "versus_train"}  # and not less than before
    (bench.folder / "versus_train").unlink()
    done, found, calls = bench()
    assert done.returncode == 0
    assert found["incomplete"] == []
    assert found["versus_train"] == {"part": "less"}  # all that there is
    assert [call.split()[0] for call in calls] == ["versus_train"]


def test_what_was_not_tried_comes_before_what_failed(bench):
    (bench.folder / "rates").write_text("3")
    bench(BENCH_SECONDS="5")
    bench()
    for mark in ("versus_evaluate.done", "versus_evaluate.tried"):
        (bench.folder / "out" / mark).unlink()
    _, found, calls = bench()
    assert [call.split()[0] for call in calls] == ["versus_evaluate", "rates"]
    assert found["incomplete"] == ["rates"]


def test_what_had_no_time_is_named(bench):
    done, found, calls = bench(BENCH_SECONDS="5")
    assert done.returncode == 124
    assert {"rates", "versus_train", "whole_run_warm"} < set(found["incomplete"])
    assert calls == []


def test_a_call_that_is_ended_leaves_what_it_had(bench):
    (bench.folder / "whole_run_warm").write_text("wait")
    job = subprocess.Popen([SCRIPT, bench.folder / "out"])
    until = time.monotonic() + 60
    while not (bench.folder / "waiting").exists() and time.monotonic() < until:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 143
    found = json.loads((bench.folder / "out" / "bench.json").read_text())
    assert found["rates"] == {"part": "rates"}
    assert found["whole_run_warm"] == {"part": "whole_run_warm"}
    assert found["incomplete"][0] == "whole_run_warm"
    assert len(found["incomplete"]) == 4


def test_a_dry_run_prints_every_command_and_starts_none(tmp_path):
    command = [SCRIPT, "--dry-run", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measuring = [line for line in done.stdout.splitlines() if " -m mmrjax.bench " in line]
    assert len(measuring) == 7
    assert not (tmp_path / "out").exists()

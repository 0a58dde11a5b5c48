"""Killed and resumed equals uninterrupted, bit for bit; SIGTERM saves and leaves.

A run here is scripts/campaign.py's: from raw pictures to the report. `pytest -m slow` kills more.
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from mmrjax.runtime import logs

spec = importlib.util.spec_from_file_location(
    "campaign", pathlib.Path(__file__).resolve().parents[2] / "scripts" / "campaign.py"
)
campaign = sys.modules["campaign"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(campaign)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """(folder, seconds per phase) of a finished run that nobody disturbed."""
    work = tmp_path_factory.mktemp("campaign")
    campaign.draw_parts(work / "parts")
    return work, campaign.finish(work / "untouched").spans


def play(untouched, kills, seed):
    work, spans = untouched
    folder = work / f"seed{seed}"
    folder.mkdir()
    for name in ("parts", "untouched"):
        (folder / name).symlink_to(work / name)
    return campaign.campaign(kills, seed, folder, spans)


def test_three_kills_at_random_moments_change_nothing(untouched):
    kills = play(untouched, 3, seed=3)
    assert [kill.differing for kill in kills] == [[], [], []]


@pytest.mark.slow
def test_many_kills_at_random_moments_change_nothing(untouched):
    kills = play(untouched, 20, seed=0)
    assert [kill.differing for kill in kills] == [[]] * 20


def test_sigterm_saves_and_the_next_start_goes_on_from_there(untouched):
    work, _ = untouched
    home = work / "terminated"
    home.mkdir()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(campaign.ROOT)}
    with (home / "stopped.txt").open("w") as out:
        process = subprocess.Popen(campaign.command(), cwd=home, env=environment, stderr=out)
    while not any((home / campaign.RUN / "checkpoints" / "train").glob("[0-9]")):
        assert process.poll() is None, (home / "stopped.txt").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    last = (home / "stopped.txt").read_text().splitlines()[-1]
    step = int(last.removeprefix("stopped at step ").split()[0])
    assert last.endswith("saved; the same command continues")
    campaign.finish(home)
    resumed = f"resuming at step {step} of" in (home / "log.txt").read_text()
    assert resumed == (step < campaign.STEPS)
    assert campaign.differences(campaign.result(home), campaign.result(work / "untouched")) == []


def test_the_comparison_sees_a_flipped_bit_anywhere(untouched):
    run = untouched[0] / "untouched"
    wanted = campaign.result(run)
    for name, part in (("scores.csv", "scores.csv"), ("maps/000_heat.png", "maps/000_heat.png")):
        path = run / campaign.RUN / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert campaign.differences(campaign.result(run), wanted) == [part]
        path.write_bytes(whole)


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

"""One program at a time is at work in a folder."""

import os
import subprocess
import sys
import threading

from mmrjax.runtime import files

PATIENCE = 60  # s
HOLD = """
import pathlib, sys, time
from mmrjax.runtime import files
with files.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_program_waits_until_the_first_ends_and_nothing_is_left(tmp_path, monkeypatch):
    folder = tmp_path / "mmr" / "parts" / "seed1"
    said, waiting, entered = [], threading.Event(), threading.Event()
    monkeypatch.setattr(files.logging, "warning", lambda *x: (said.append(x), waiting.set()))

    def enter():
        with files.held(folder):
            entered.set()

    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            second = threading.Thread(target=enter)
            second.start()
            assert waiting.wait(PATIENCE)
            assert not entered.is_set()
        finally:
            other.kill()
    assert entered.wait(PATIENCE)
    second.join(PATIENCE)
    ((text, named),) = said
    assert named == folder
    assert "another call is at work there; waiting" in text
    with files.held(folder):
        assert not os.listdir(folder)


def test_a_file_system_that_cannot_lock_keeps_nobody_out(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("Bad file descriptor")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.held(tmp_path), files.held(tmp_path):
        pass


def test_two_processes_that_write_one_file_do_not_fight(tmp_path):
    code = (
        "import pathlib, sys\n"
        "from mmrjax.runtime import files\n"
        "for i in range(60): files.write_text(pathlib.Path(sys.argv[1]), sys.argv[2] * 1000)\n"
    )
    target = tmp_path / "results.json"
    started = [subprocess.Popen([sys.executable, "-c", code, target, text]) for text in "abc"]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(set(target.read_text())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]

"""One program at a time is at work in a folder."""

import os
import signal
import subprocess
import sys

import pytest

from mmrjax import files

HOLD = """
import pathlib, sys, time
from mmrjax import files
with files.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_by_one_program_until_it_ends_and_keeps_nothing_of_it(tmp_path):
    folder = tmp_path / "mmr" / "parts" / "seed1"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"seed1: another call.*another --workdir"):
            with files.held(folder):
                pass
        other.send_signal(signal.SIGKILL)
    for _ in range(2):
        with files.held(folder):
            assert not os.listdir(folder)


def test_a_file_system_that_cannot_lock_keeps_nobody_out(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("Bad file descriptor")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.held(tmp_path), files.held(tmp_path):
        pass

"""The needs of a run are looked for before anything is built, and missed all at once."""

import re
import urllib.error
import urllib.request

import pytest

from mmrjax import main
from mmrjax.runs import records
from mmrjax.runtime import config as config_lib


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache of weights."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path / "cache"))


def test_records_teacher_and_student_are_missed_together(offline, tmp_path):
    config = config_lib.load("configs/aebad.py", [f"data.data_dir={tmp_path / 'records'}"])
    with pytest.raises(records.Missing) as caught:
        records.check_needs([config])
    head, *things, demo = caught.value.lines
    assert head.startswith("error: 3 things are missing")
    for line, words in zip(
        things, ("no records in .*data.raw_dir", "wide_resnet50_2", "mae_visualize"), strict=True
    ):
        assert re.search(words, line), line
    assert "configs/demo.py" in demo
    assert not (tmp_path / "records").exists()


def test_a_single_thing_is_one_line_and_finished_runs_need_no_weights(offline, tmp_path):
    config = config_lib.load("configs/aebad.py", [f"data.data_dir={tmp_path / 'records'}"])
    with pytest.raises(FileNotFoundError, match=r"no records .* \(here: --config.data.raw_dir=…\)"):
        records.check_needs([config], weights=False)


def test_what_several_rows_miss_is_said_once(offline, tmp_path):
    config = config_lib.load("configs/aebad.py", [f"data.data_dir={tmp_path / 'records'}"])
    with pytest.raises(records.Missing) as caught:
        records.check_needs([config, config])
    assert len(caught.value.lines) == 5


@pytest.mark.parametrize(
    ("spec", "folder"),
    [
        ("configs/aebad.py", "runs/aebad"),
        ("configs/magnetic_tile.py:crop", "runs/magnetic_tile_crop"),
    ],
)
def test_the_work_directory_is_named_after_the_configuration(spec, folder):
    assert main.parse([f"--config={spec}"])[1].workdir == folder
    assert main.parse([f"--config={spec}", "--workdir=else"])[1].workdir == "else"


def test_the_program_says_all_of_it_and_builds_nothing(offline, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main.main(["--config=configs/aebad.py", "--config.data.data_dir=records"]) == 1
    lines = capfd.readouterr().err.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("error: 3 things"))
    assert [line[:5] for line in lines[at + 1 :]] == ["  1. ", "  2. ", "  3. ", "  to "]
    assert not (tmp_path / "records").exists()

"""The command `mmrjax`: errors come before JAX is imported, two commands give verdicts."""

import csv
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import cv2
import numpy as np
import pytest

import mmrjax
from mmrjax import __main__ as cli
from mmrjax import methods
from mmrjax.runs import arguments, places
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import fields

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Runs the command, then tells whether JAX came with it; the exit status is that of the command.
PROBE = """
import sys
from mmrjax import __main__ as cli
try:
    status = cli.main(sys.argv[1:])
except SystemExit as e:
    status = e.code
print("imported", *{"jax", "flax", "tensorflow_datasets"} & {*sys.modules})
sys.exit(status)
"""


def probe(*words: str, cwd: pathlib.Path) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "mmrjax train"),
        (["--version"], 0, mmrjax.__version__),
        (["trian"], 2, "did you mean train"),
        (["train", "--help"], 0, "good parts"),
        (["train"], 2, "nothing to train on"),
        (["train", "nowhere"], 2, "nowhere: no such folder"),
        (["train", ".", "--config.train.epoch=3"], 2, "did you mean train.epochs"),
        (["train", ".", "--config.train.epochs=three"], 2, "expected int"),
        (["train", ".", "--method=patchcor"], 2, "patchcore"),
        (["predict", "--help"], 0, "recalibrate"),
        (["predict"], 2, "no image is given"),
        (["predict", "a.png"], 2, "no run in"),
        (["predict", "a.png", "--calibration=no.json"], 2, "no.json: no such file"),
        (["export", "--output=scorer.pt"], 2, ".jax or .onnx"),
        (["report", "nowhere"], 2, "no run of that name"),
        (["compare", "one"], 2, "second"),
        (["compare", "one", "two"], 2, "no run of that name"),
        (["convert", "to-torch", "--kind=nothing"], 2, "invalid choice"),
        (["bench", "--parts=nothing"], 2, "known are"),
        (["check", "--help"], 0, "mmrjax check <folder>"),
        (["configs"], 0, "folder "),
        (["configs", "fodler"], 2, "no configuration file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_mistakes_are_answered_before_jax_is_imported(words, status, said, tmp_path):
    found, text = probe(*words, cwd=tmp_path)
    assert said in text
    assert found == status
    assert next(line for line in text.splitlines() if line.startswith("imported")) == "imported"


def test_files_of_the_working_directory_stand_for_no_library(tmp_path):
    for name in ("tree", "parts", "jax"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the user')")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "mmrjax", "configs", "folder"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "data.image_size = (224, 224)" in done.stdout


def test_the_sources_declare_every_field():
    known = config_lib.flatten(config_lib.load("configs/common.py"))
    declared = fields.declared()
    assert {*declared} == {name for name in known if not name.startswith("raw_dirs.")}
    field = declared["train.batch_size"]
    assert field.text == repr(known["train.batch_size"])
    file, _, line = field.place.partition(":")
    assert "train.batch_size = " in (ROOT / file).read_text().splitlines()[int(line) - 1]
    assert declared["data.shots"].comment == "training images of k_shot, drawn by the seed"
    assert declared["teacher.weights"].comment.startswith("embedded")  # it stands above the field
    assert fields.constants("name") == sorted(methods.METHODS)
    assert {*fields.constants("official")} == {
        kind.official for kind in methods.METHODS.values() if kind.official
    }


def test_the_fields_of_a_configuration_have_value_comment_and_source(capsys):
    assert cli.main(["configs", "folder"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (own,) = [line for line in lines if line.startswith("data.max_side = ")]
    assert "1024" in own
    assert "shrink training images" in own
    assert "[configs/folder.py:" in own
    assert len([line for line in lines if " = " in line]) > 100


def test_every_configuration_has_a_line(capsys):
    assert cli.main(["configs"]) == 0
    text = capsys.readouterr().out
    for path in config_lib.packaged():
        assert f"{path.stem} " in text


def make_run(folder: pathlib.Path, age: int, finished: bool = True, data: str = "folder"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": {"name": data}}))
    for name in ("config.json", *(["results.json"] if finished else [])):
        (folder / name).touch()
        os.utime(folder / name, (age, age))
    return folder


def test_the_run_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="train first: mmrjax train"):
        places.run(None)
    old = make_run(pathlib.Path("runs/bolts/some/bolts/seed1"), 100)
    new = make_run(pathlib.Path("runs/nuts/some/nuts/seed1"), 200)
    make_run(pathlib.Path("runs/nuts/other/nuts/seed1"), 300, finished=False)
    make_run(pathlib.Path("runs/nuts/evaluations/dark/some/nuts/seed1"), 400)
    assert places.run(None) == str(new)  # the latest that is finished
    for given in ("runs/bolts", "bolts", "runs/bolts/some/bolts", old, "runs/bolts/some"):
        assert places.run(given) == str(old)
    assert places.workdir(None) == "runs/nuts"
    assert places.workdir("nuts") == places.workdir(str(new)) == "runs/nuts"
    assert places.run("gs://bucket/run") == "gs://bucket/run"
    with pytest.raises(ValueError, match=r"nuts holds 2 runs; name one of them: runs/nuts/other"):
        places.run("nuts")
    with pytest.raises(FileNotFoundError, match=r"screws: no such folder.*runs/bolts"):
        places.run("screws")
    make_run(pathlib.Path("runs/tiles/some/tile/seed1"), 500, data="magnetic_tile")
    assert places.run("magnetic_tile") == "runs/tiles/some/tile/seed1"


def test_a_training_by_name_of_a_folder_or_of_a_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bolts").mkdir()
    assert arguments.parse_train(["bolts", "--config.train.seeds=1"]) == [
        "--config=folder",
        "--workdir=runs/bolts",
        "--config.data.raw_dir=bolts",
        "--config.method.names=auto",
        "--config.train.seeds=1",
        "--mode=train",
    ]
    assert arguments.training("demo") == ["--config=demo"]
    given = ["method.names=mmr"]
    assert "--config.method.names=auto" not in arguments.training("bolts", given=given)
    with pytest.raises(ValueError, match="give one of the two"):
        arguments.training("demo", config="folder")


@pytest.fixture(scope="module")
def trained(tiny_raw, tiny_fields, tmp_path_factory):
    """A folder in which `mmrjax train` was called, and the overrides of a small run."""
    home = tmp_path_factory.mktemp("two")
    overrides = [
        text
        for text in tiny_fields(tiny_raw, home / "records")
        if not text.startswith("--config.data.raw_dir")
    ]
    overrides += ["--config.calibration.fraction=0.5", "--config.calibration.target_fpr=0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(["train", str(tiny_raw), *overrides]) == 0
    return home, overrides


def test_two_commands_give_verdicts(trained, tiny_raw, monkeypatch, capsys):
    home, _ = trained
    monkeypatch.chdir(home)
    assert cli.main(["predict", str(tiny_raw / "good"), str(tiny_raw / "bad/00.png")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("run: runs/parts/patchcore/parts/seed54")
    assert "next" in said
    with open("predicted/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["verdict"] for row in rows} <= {"good", "anomaly"}
    assert [row["path"] for row in rows][-1] == "bad/00.png"
    assert len(rows) == 13
    assert f"{rows[-1]['verdict']:11} score" in said


def test_the_other_verbs_find_the_run(trained, monkeypatch, capsys):
    home, _ = trained
    monkeypatch.chdir(home)
    assert cli.main(["report"]) == 0
    assert capsys.readouterr().out.strip() == "runs/parts/report.html"
    assert cli.main(["compare", "parts", "runs/parts"]) == 0
    assert "image_auroc" in capsys.readouterr().out


def test_the_training_says_how_to_go_on(trained, tiny_raw, monkeypatch, capsys):
    home, overrides = trained
    monkeypatch.chdir(home)
    assert cli.main(["train", str(tiny_raw), *overrides]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    run = "runs/parts/patchcore/parts/seed54"
    assert last == f"predict: mmrjax predict <images> --workdir={run}"


def test_python_trains_predicts_shows_and_exports(trained, tiny_raw, monkeypatch):
    home, overrides = trained
    monkeypatch.chdir(home)
    pairs = (text.removeprefix("--config.").split("=", 1) for text in overrides)
    detector = mmrjax.train(tiny_raw, fields=dict(pairs))
    path = tiny_raw / "bad" / "00.png"
    (found,) = detector.predict([path])
    assert found.is_anomaly in (True, False)
    shown = cv2.imdecode(np.frombuffer(found._repr_png_(), np.uint8), cv2.IMREAD_COLOR_RGB)
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    np.testing.assert_array_equal(shown[:, : image.shape[1]], image)
    assert shown.shape == (image.shape[0], 2 * image.shape[1], 3)
    assert f"<b>{found.row()['verdict']}</b>" in found._repr_html_()
    assert "00.png" in found._repr_html_()
    (unnamed,) = detector.predict([image])
    assert unnamed._repr_png_() == found._repr_png_()
    html = detector._repr_html_()
    assert "PatchCore, runs/parts/patchcore/parts/seed54" in html
    assert html.count("<img ") == 3
    assert detector.report().name == "report.html"
    with pytest.raises(ValueError, match=r"scorer\.pt: a name that ends in \.jax or \.onnx"):
        detector.export("scorer.pt")
    if importlib.util.find_spec("flatbuffers"):
        assert detector.with_target(0.5).export("scorer.jax").stat().st_size > 1000


def test_python_names_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        mmrjax.train("nowhere")
    with pytest.raises(FileNotFoundError, match="train first"):
        mmrjax.load()

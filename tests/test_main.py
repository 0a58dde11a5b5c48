"""The whole program from the command line: results, repetition, other views, bad input."""

import json
import shutil

import pytest

from mmrjax import main
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import files


def test_a_run_leaves_everything_the_report_needs(finished):
    workdir, _ = finished
    run = workdir / "mmr" / "parts" / "seed1"
    for name in ("config.json", "metrics.jsonl", "scores.csv", "curves.json", "results.json"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "maps" / "gallery.json").exists()
    assert (workdir / "report.html").stat().st_size > 10_000
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert lines[0]["lr"] == 0.0


def test_results_hold_seeds_methods_and_a_paired_comparison(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    assert set(results["methods"]) == {"mmr", "patchcore"}
    values = results["methods"]["mmr"]["metrics"]["folder/parts"]["all"]["image_auroc"]
    assert set(values["seeds"]) == {"1", "2"}
    assert values["mean"] == pytest.approx(sum(values["seeds"].values()) / 2)
    assert 0 <= values["ci95"][0] <= values["ci95"][1] <= 1
    (comparison,) = results["comparisons"]
    assert (comparison["a"], comparison["b"]) == ("mmr", "patchcore")


def test_patchcore_finds_the_bright_squares(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    found = results["methods"]["patchcore"]["metrics"]["folder/parts"]["all"]
    assert found["pixel_auroc"]["mean"] > 0.8


def test_the_random_teacher_is_confessed(finished):
    run = json.loads((finished[0] / "mmr/parts/seed1/results.json").read_text())
    assert run["facts"]["teacher"]["random"] is True
    assert "random" in (finished[0] / "report.html").read_text().lower()


@pytest.fixture
def held(monkeypatch):
    """The folders that a call holds, in their order."""
    real, folders = files.held, []
    monkeypatch.setattr(files, "held", lambda folder: folders.append(folder) or real(folder))
    return folders


def test_repeating_the_command_redoes_nothing(finished, held):
    workdir, args = finished
    watched = [
        p for p in workdir.rglob("*") if p.name in ("results.json", "metrics.jsonl", "scores.csv")
    ]
    before = {p: p.stat().st_mtime_ns for p in watched if p.parent != workdir}
    assert main.main(args) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert held == [
        workdir / method / "parts" / f"seed{k}" for method in ("mmr", "patchcore") for k in (1, 2)
    ]


def test_a_lost_calibration_is_made_again(finished):
    file = finished[0] / "patchcore/parts/seed1/calibration.json"
    before = file.read_bytes()
    file.unlink()
    assert main.main(finished[1]) == 0
    assert file.read_bytes() == before


def test_an_added_seed_trains_only_itself(finished):
    workdir, args = finished
    before = (workdir / "patchcore/parts/seed1/results.json").stat().st_mtime_ns
    more = [*args, "--config.train.seeds=1,2,3", "--config.method.names=patchcore"]
    assert main.main(more) == 0
    assert (workdir / "patchcore/parts/seed3/results.json").exists()
    assert (workdir / "patchcore/parts/seed1/results.json").stat().st_mtime_ns == before


def test_another_view_is_evaluated_beside_the_first(finished, held):
    workdir, args = finished
    before = (workdir / "mmr/parts/seed1/results.json").read_bytes()
    view = [
        *args,
        "--mode=evaluate",
        "--config.eval.resize=80,80",
        "--config.eval.metrics_mode=mmr",
    ]
    one = ["--config.method.names=mmr", "--config.train.seeds=1"]
    assert main.main([*view, *one]) == 0
    other = workdir / "evaluations" / "resize80x80-metrics_mmr"
    assert (other / "report.html").exists()
    assert {folder.parents[2] for folder in held} == {other}  # the runs stay free
    held.clear()
    assert main.main([*(word for word in view if word != "--mode=evaluate"), *one]) == 0
    assert held == [other / "mmr/parts/seed1", workdir / "mmr/parts/seed1"]  # always in this order
    assert (other / "mmr/parts/seed1/results.json").read_bytes() != before
    assert (workdir / "mmr/parts/seed1/results.json").read_bytes() == before


def test_evaluation_of_an_unfinished_run_is_refused(finished, tmp_path, capsys):
    workdir, args = finished
    args = [a for a in args if not a.startswith("--workdir")]
    shutil.copytree(workdir / "mmr/parts/seed1", tmp_path / "mmr/parts/seed1")
    shutil.rmtree(tmp_path / "mmr/parts/seed1/checkpoints")
    (tmp_path / "mmr/parts/seed1/results.json").unlink()
    assert main.main([*args, f"--workdir={tmp_path}", "--mode=evaluate"]) == 1
    assert "not trained to the end (step 0 of" in capsys.readouterr().err


def test_evaluation_from_the_checkpoint_repeats_the_scores(finished, tmp_path):
    workdir, args = finished
    run = workdir / "mmr/parts/seed1"
    before = (run / "scores.csv").read_bytes()
    (run / "results.json").unlink()
    assert main.main([*args, "--mode=evaluate"]) == 0
    assert (run / "scores.csv").read_bytes() == before


BAD_INPUT = {
    "misspelled field": (["--config.train.epoch=3"], "train.epochs"),
    "wrong type": (["--config.train.epochs=many"], "expected int"),
    "stray argument": (["stray"], "unknown argument 'stray'"),
    "unknown flag": (["--wrkdir=x"], "unknown argument"),
    "unknown method": (
        ["--config.method.names=mmx"],
        "known: ['aminet', 'mala', 'mmr', 'mmr_plus', 'patchcore', 'subspace_ad']",
    ),
    "missing folder": (["--config.data.raw_dir={tmp}/nowhere"], "nowhere"),
    "indivisible batch": (["--config.train.batch_size=12"], "divisible by 8 devices; try 8 or 16"),
    "missing weights": (["--config.teacher.weights={tmp}/no.safetensors"], "no weights file"),
    "unknown teacher": (["--config.teacher.name=resnet19"], "available"),
    "bad size": (["--config.data.image_size=60,60"], "multiple of the patch"),
    "bad mode": (["--mode=test"], "--mode"),
    "nothing trained": (["--mode=evaluate"], "nothing trained"),
    "epochs for shares": (["--config.optim.drops=23,31"], "between 0.0 and 1.0"),
    "crop larger than the image": (["--config.data.image_size=96,96"], "cropped from it"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_clear_line_and_a_failure(case, tiny_args, tmp_path, capsys):
    extra, expected = BAD_INPUT[case]
    status = main.main([*tiny_args, *(a.format(tmp=tmp_path) for a in extra)])
    message = capsys.readouterr().err.strip()
    assert status == 1
    line = [line for line in message.splitlines() if line.startswith("error: ")]
    assert len(line) == 1
    assert expected in line[0]
    assert "Traceback" not in message


def test_a_missing_configuration_shows_a_command_that_works(tiny_args, capsys):
    rest = [a for a in tiny_args if not a.startswith("--config=")]
    assert main.main(rest) == 1
    assert "configs/demo.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("--workdir=s3://shop/runs", "expected a folder here, or gs://"),
        ("--config.data.data_dir=s3://shop/r", "expected a folder here, or gs://"),
        ("--config.data.raw_dir=gs://shop/parts", "copy what is in a bucket, or mount it"),
    ],
)
def test_an_address_is_refused_in_words_where_folders_are_needed(
    field, words, tiny_args, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    name = field.split("=")[0]
    args = [a for a in tiny_args if not a.startswith(f"{name}=")]
    assert main.main([*args, field]) == 1
    message = capsys.readouterr().err
    assert field.split("=")[1] in message
    assert words in message
    assert list(tmp_path.iterdir()) == []  # pathlib would make a folder "gs:"


def test_cores_share_the_batches_of_all_that_will_run():
    config = config_lib.load("configs/demo.py", ["train.batch_size=12", "aminet.batch_size=5"])
    config.method.names = ("mmr", "patchcore")
    assert main.batch_sizes(config) == {12, config.eval.batch_size}
    config.method.names = ("aminet",)
    assert main.batch_sizes(config) == {5, config.eval.batch_size}
    config.sweep.rows = (
        ("few", ("aminet.batch_size=1",), "x"),
        ("many", ("eval.batch_size=64",), "x"),
    )
    assert main.batch_sizes(config) == {1, 5, config.eval.batch_size, 64}

"""The command that scores files: what it writes, what it skips, what it refuses."""

import csv
import json
import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

import mmrjax
from mmrjax.predict import __main__ as predict
from mmrjax.report import pictures as pictures_lib

COLUMNS = ["path", "score", "threshold", "verdict", "p_value", "boxes"]


@pytest.fixture(scope="module")
def run(finished):
    return finished[0] / "patchcore" / "parts" / "seed1"


def command(run, out, *extra):
    return predict.main([f"--workdir={run}", f"--output={out}", *map(str, extra)])


@pytest.fixture(scope="module")
def written(run, tiny_raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("predicted")
    assert command(run, out, f"--input={tiny_raw}", "--raw_maps=npy") == 0
    return out


def rows_of(out):
    csv_rows = list(csv.DictReader((out / "scores.csv").open(newline="")))
    return csv_rows, [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def test_every_image_has_a_row_its_pictures_and_its_map(written, tiny_raw, run):
    by_csv, by_json = rows_of(written)
    assert list(by_csv[0]) == COLUMNS == list(by_json[0])
    assert len(by_json) == 16  # the masks beside four of them are no pictures
    expected = dict(csv.reader((run / "scores.csv").open(newline="")).__next__() and [
        (row["id"], row["score"]) for row in csv.DictReader((run / "scores.csv").open(newline=""))
    ])  # fmt: skip
    for text, row in zip(by_csv, by_json, strict=True):
        assert float(text["score"]) == row["score"]
        assert row["verdict"] == ("anomaly" if row["score"] > row["threshold"] else "good")
        image = cv2.imread(str(tiny_raw / row["path"]))
        raw = np.load(written / "maps" / f"{row['path']}.npy")
        assert (raw.dtype, raw.shape) == (np.float32, image.shape[:2])
        for folder in ("overlays", "heat"):
            assert cv2.imread(str(written / folder / f"{row['path']}.png")).shape == image.shape
        if row["path"] in expected:
            assert row["score"] == pytest.approx(float(expected[row["path"]]), abs=1e-6)
    assert any(row["verdict"] == "anomaly" and row["boxes"] for row in by_json)


def test_one_colour_scale_serves_every_image(written, run):
    """Equal map values have equal colours in all pictures, and the report has the same scale."""
    scale = json.loads((run / "maps" / "gallery.json").read_text())["scale"]
    for name in ("good/00.png", "bad/00.png"):
        raw = np.load(written / "maps" / f"{name}.npy")
        heat = cv2.imread(str(written / "heat" / f"{name}.png"))[..., ::-1]
        colour, _ = pictures_lib.colour_and_opacity(pictures_lib.scale_position(raw, tuple(scale)))
        np.testing.assert_array_equal(heat, colour)


def test_unreadable_files_are_listed_skipped_and_shown_by_the_exit_status(
    run, tiny_raw, tmp_path, capsys
):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    (folder / "fine.png").write_bytes((tiny_raw / "good" / "00.png").read_bytes())
    out = tmp_path / "out"
    assert command(run, out, f"--input={folder}/*", "--raw_maps=tiff") == 3
    said = capsys.readouterr()
    assert "skipped: " in said.err
    assert "broken.jpg" in said.err
    assert [row["path"] for row in rows_of(out)[1]] == ["fine.png"]
    assert np.asarray(Image.open(out / "maps" / "fine.png.tiff")).dtype == np.float32


ODD_NAMES = [
    b"pr\xfcf.png",
    b"a\rb.png",
    b"a\nb.png",
    b"\x1b[31m.png",
    b"=1+1.png",
    b"n" * 249 + b".png",
]


def test_no_name_of_a_file_costs_the_scores(run, tiny_raw, tmp_path, capsys):
    folder, picture = tmp_path / "in", (tiny_raw / "good" / "00.png").read_bytes()
    folder.mkdir()
    for name in ODD_NAMES:
        (folder / os.fsdecode(name)).write_bytes(picture)
    (folder / "dead.png").symlink_to("/nowhere.png")
    os.mkfifo(folder / "pipe.png")
    out = folder / "results"  # below the input
    for _ in range(2):  # the second call does not score the pictures of the first
        assert command(run, out, f"--input={folder}", "--raw_maps=npy") == 3
        by_csv, by_json = rows_of(out)
        assert len(by_json) == len(ODD_NAMES)
        assert all(row["path"].isprintable() for row in by_json)
        assert sum(row["path"].startswith("'=") for row in by_csv) == 1
        assert len([*(out / "overlays").iterdir()]) == len(ODD_NAMES)
    said = capsys.readouterr().err
    assert "dead.png: a link to nothing" in said
    assert "pipe.png: no ordinary file" in said


def test_results_among_the_pictures_themselves_are_not_scored(run, tiny_raw, tmp_path):
    shutil.copy(tiny_raw / "good" / "00.png", tmp_path / "a.png")
    for _ in range(2):
        assert command(run, tmp_path, f"--input={tmp_path}") == 0
        assert [row["path"] for row in rows_of(tmp_path)[1]] == ["a.png"]


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_is_never_good(run, score):
    detector = mmrjax.load(run)
    row = detector._prediction(score, np.zeros(detector.view.frame, np.float32), (64, 64)).row()
    assert (row["score"], row["verdict"]) == (None, "cannot judge")
    assert "1 CANNOT BE JUDGED" in predict.summary(detector, [row], "out")


def test_recalibration_leaves_defects_out_and_counts_equal_pixels_once(run, tiny_raw, tmp_path):
    good = predict.good_images(str(tiny_raw), 0)
    assert {path.parent.name for path in good} == {"good"}
    shutil.copy(tiny_raw / "good" / "00.png", tmp_path / "a.png")
    shutil.copy(tiny_raw / "good" / "00.png", tmp_path / "b.png")
    assert len(set(predict.good_images(str(tmp_path), 0).values())) == 1


def test_recalibration_is_written_and_can_be_used_again(run, tiny_raw, tmp_path):
    good, bad = tiny_raw / "good", tiny_raw / "bad" / "00.png"
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(run, first, f"--recalibrate={good}", "--target_fpr=0.1", f"--input={bad}") == 0
    again = [f"--calibration={first / 'calibration.json'}", "--target_fpr=0.1", f"--input={bad}"]
    assert command(run, second, *again, "--no_pictures") == 0
    assert rows_of(first) == rows_of(second)
    assert not (second / "heat").exists()
    assert rows_of(first)[1][0]["threshold"] != json.loads(
        (run / "results.json").read_text())["calibration"]["threshold"]  # fmt: skip


def test_what_the_command_line_contradicts_is_refused(run, tiny_raw, tmp_path, capsys):
    both = [f"--recalibrate={tiny_raw}", f"--calibration={tmp_path}/x.json"]
    for extra, message in ((both, "not allowed with"), (["--full_scale=-5"], "a grey level")):
        with pytest.raises(SystemExit) as ended:
            command(run, tmp_path / "out", f"--input={tiny_raw}", *extra)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_refused_recalibration_leaves_the_older_one(run, tiny_raw, tmp_path, capsys):
    good, path = tiny_raw / "good", tmp_path / "calibration.json"
    assert command(run, tmp_path, f"--recalibrate={good}", "--target_fpr=0.1") == 0
    assert f"wrote {path}" in capsys.readouterr().out
    before = path.read_bytes()
    assert command(run, tmp_path, f"--recalibrate={good / '00.png'}") == 1
    assert path.read_bytes() == before
    assert command(run, tmp_path, f"--recalibrate={tmp_path / 'none'}") == 1
    assert "error: --recalibrate=" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_scoring(
    run, tiny_raw, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(predict.detector_lib, "load", lambda _: pytest.fail("loaded the model"))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert command(run, out, f"--input={tiny_raw}", "--no_pictures") == 1
        assert f"error: --output={out}: no folder to write into" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--input={tmp}/none/*.png"], "no image there"),
        (["--input={raw}", "--target_fpr=0.01"], "5 held-out good images can promise .* needs 99"),
        (["--input={raw}", "--recalibrate={raw}/bad/00.png"], "1 held-out good image can promise"),
        (["--input={raw}", "--calibration={tmp}/none.json"], "no such file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(extra, message, run, tiny_raw, tmp_path, capsys):
    extra = [text.format(tmp=tmp_path, raw=tiny_raw) for text in extra]
    assert command(run, tmp_path / "out", *extra) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert __import__("re").search(message, line), line


@pytest.fixture
def film(tmp_path, tiny_raw):
    """Twelve frames, the last four defective."""
    path = tmp_path / "line 1.mp4"
    pictures = sorted((tiny_raw / "good").glob("*.png"))[:8] + [
        tiny_raw / "bad" / f"{i:02d}.png" for i in range(4)
    ]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (144, 128))
    for picture in pictures:
        frame = cv2.resize(cv2.imread(str(picture)), (144, 128))
        writer.write(frame)
    writer.release()
    return path


def test_a_video_gets_an_overlay_with_its_curve_and_a_row_per_frame(run, film, tmp_path):
    assert command(run, tmp_path / "out", f"--input={film}") == 0
    _, rows = rows_of(tmp_path / "out")
    assert [row["frame"] for row in rows] == list(range(12))
    assert rows[5]["seconds"] == 0.5
    assert max(row["score"] for row in rows[8:]) > max(row["score"] for row in rows[:8])
    video = cv2.VideoCapture(str(tmp_path / "out" / "line 1_overlay.mp4"))
    assert (video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS)) == (12, 10)
    found, frame = video.read()
    assert found
    assert frame.shape == (128 + 120, 144, 3)
    assert frame[128:].mean() < 90  # the panel of the curve is dark


def test_a_video_heeds_the_flags_of_images(run, film, tmp_path):
    extra = [f"--input={film}", "--raw_maps=npy", "--no_pictures"]
    assert command(run, tmp_path / "out", *extra) == 0
    assert not list((tmp_path / "out").glob("*.mp4"))
    maps = sorted((tmp_path / "out" / "maps" / film.name).iterdir())
    assert [path.name for path in maps] == [f"{i:06d}.npy" for i in range(12)]
    assert np.load(maps[3]).shape == (128, 144)


def test_a_video_that_is_none_is_refused(run, tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    assert command(run, tmp_path / "out", f"--input={tmp_path / 'a.mp4'}") == 1
    assert "reads no frame" in capsys.readouterr().err


def test_an_interrupted_call_keeps_what_it_has_scored(run, tiny_raw, tmp_path, monkeypatch, capsys):
    write, calls = predict.write_map, []

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(write(*args))

    monkeypatch.setattr(predict, "write_map", interrupted)
    status = command(run, tmp_path, f"--input={tiny_raw}", "--raw_maps=npy", "--no_pictures")
    assert status == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert len(rows_of(tmp_path)[0]) == 4

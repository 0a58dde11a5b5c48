"""A loaded run scores as its evaluation did, whatever the order, the batch and the size."""

import csv
import shutil

import cv2
import numpy as np
import pytest

import mmrjax
from mmrjax import convert, main
from mmrjax.data import geometry
from mmrjax.evaluate import calibrate
from mmrjax.runs import detector as detector_lib
from mmrjax.runs import restore


@pytest.fixture(scope="module", params=["mmr", "patchcore"])
def loaded(request, finished):
    run = finished[0] / request.param / "parts" / "seed1"
    return mmrjax.load(run), run


def evaluated(run) -> dict[str, float]:
    with (run / "scores.csv").open(newline="") as file:
        return {row["id"]: float(row["score"]) for row in csv.DictReader(file)}


def test_scores_equal_those_of_the_evaluation_in_any_order_and_batch(loaded, tiny_raw):
    detector, run = loaded
    expected = evaluated(run)
    names = sorted(expected)[::-1]
    found = detector.predict([tiny_raw / name for name in names])
    for name, one in zip(names, found, strict=True):
        assert one.score == pytest.approx(expected[name], abs=1e-6)
    alone = detector.predict([str(tiny_raw / names[2])])
    assert alone[0].score == pytest.approx(expected[names[2]], abs=1e-6)
    detector.config.eval.batch_size = 16  # was 8
    try:
        again = detector.predict([tiny_raw / name for name in names])
    finally:
        detector.config.eval.batch_size = 8
    np.testing.assert_allclose([a.score for a in again], [f.score for f in found], atol=1e-6)


def test_a_picture_costs_a_picture_and_many_compile_nothing_more(loaded, tiny_raw):
    detector, _ = loaded
    other = detector.with_calibration(detector.calibration)
    other.config.eval.batch_size, shared = 32, detector.trained.mesh.size
    sizes, real = [], other._predict

    def watched(variables, frozen, images):
        sizes.append(len(images))
        return real(variables, frozen, images)

    other._predict = watched
    paths = sorted(tiny_raw.glob("good/*.png"))
    for count, expected in ((1, shared), (shared, shared), (shared + 1, 32), (33, 32)):
        sizes.clear()
        found = other.predict((paths * 4)[:count])
        assert len(found) == count
        assert {*sizes} == {expected}
    assert [other._batch_size(n) for n in (1, 8, 9, 32)] == [shared, 8, 32, 32]


@pytest.fixture(scope="module")
def by_place(tiny_raw, tiny_fields, tmp_path_factory):
    """A run of both methods with maps by place; (work directory, arguments)."""
    home = tmp_path_factory.mktemp("by_place")
    fields = tiny_fields(tiny_raw, home / "records")
    args = ["--config=configs/folder.py", f"--workdir={home / 'run'}", *fields]
    args += ["--config.score.by_place=true", "--config.train.epochs=2"]
    args += ["--config.patchcore.coreset=0.1"]
    assert main.main(args) == 0
    return home / "run", args


@pytest.mark.parametrize("name", ["mmr", "patchcore"])
def test_maps_by_place_are_read_from_the_run_and_none_is_learnt_twice(by_place, tiny_raw, name):
    (run,) = by_place[0].glob(f"{name}/parts/seed*")
    expected = evaluated(run)
    detector = mmrjax.load(run)
    assert set(detector.trained.variables) >= {"places"}
    ids = sorted(expected)
    for image, one in zip(ids, detector.predict([tiny_raw / i for i in ids]), strict=True):
        assert one.score == pytest.approx(expected[image], rel=1e-4, abs=1e-3)
    before = {path: path.stat().st_mtime_ns for path in (run / "fitted").rglob("*")}
    (run / "results.json").unlink()
    assert main.main([*by_place[1], "--mode=evaluate"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (run / "fitted").rglob("*")}
    assert evaluated(run) == pytest.approx(expected)


def test_too_few_images_for_places_are_refused_before_the_training(
    tiny_raw, tiny_fields, tmp_path, capsys
):
    fields = tiny_fields(tiny_raw, tmp_path / "records")
    args = ["--config=configs/folder.py", f"--workdir={tmp_path / 'run'}", *fields]
    args += ["--config.score.by_place=true", "--config.method.names=mmr"]
    args += ["--config.data.protocol=k_shot", "--config.data.shots=1"]
    assert main.main(args) == 1
    assert "needs two or more, not 1" in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("checkpoints/*"))


def test_a_student_of_a_run_by_place_is_converted_with_a_warning(by_place, tmp_path, caplog):
    (run,) = by_place[0].glob("mmr/parts/seed*")
    convert.to_torch("mmr", "", run, tmp_path / "student.safetensors")
    assert "the plain maps come out of it" in caplog.text


def test_verdicts_p_values_and_boxes_follow_from_the_held_out_images(loaded, tiny_raw):
    detector, run = loaded
    calibration = calibrate.read(run / "calibration.json")
    assert len(calibration.ids) == 5
    assert not set(calibration.ids) & set(evaluated(run))
    for path in sorted(tiny_raw.glob("*/0?.png")):
        (one,) = detector.predict([path])
        assert one.threshold == calibration.threshold(0.2)
        assert one.is_anomaly == (one.score > one.threshold) == (one.p_value <= 0.2)
        assert bool(one.boxes) == (one.view_map.max() > calibration.pixel_threshold(0.2))
        assert one.map.shape == one.size == cv2.imread(str(path)).shape[:2]


def test_another_rate_is_taken_or_refused(loaded):
    detector, _ = loaded
    assert detector.with_target(0.5).thresholds[0] <= detector.thresholds[0]
    with pytest.raises(calibrate.TooFew, match="5 held-out good images"):
        detector.with_target(0.05)


def test_recalibration_takes_the_threshold_from_the_given_images(loaded, tiny_raw):
    detector, _ = loaded
    good = sorted((tiny_raw / "good").iterdir())
    other = detector.recalibrated([cv2.imread(str(p))[..., ::-1] for p in good], "the new line")
    scores = [one.score for one in detector.predict(good)]
    assert other.calibration.threshold(0.1) == pytest.approx(sorted(scores)[11], abs=1e-6)
    assert other.with_target(0.1).thresholds[0] == other.calibration.threshold(0.1)
    assert detector.calibration.threshold(0.2) == detector.thresholds[0]  # untouched
    with pytest.raises(ValueError, match="no good image"):
        detector.recalibrated([])


def test_what_is_no_picture_is_refused_by_name(loaded, tmp_path):
    detector, _ = loaded
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    deep = np.full((20, 20), 900, np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    for given, message in (
        (np.zeros((4, 4), np.uint8), r"expected paths or RGB pixels .* uint8 \(4, 4\)"),
        (np.zeros((4, 4, 3)), "float64"),
        (tmp_path / "cut.png", r"cut\.png"),
        (tmp_path / "absent.png", r"absent\.png: No such file"),
        (tmp_path / "deep.png", "full_scale=4095"),
    ):
        with pytest.raises(ValueError, match=message):
            detector.predict([given])
    with pytest.raises(ValueError, match="expected a list of images, found one path"):
        detector.predict(str(tmp_path / "deep.png"))
    with pytest.raises(ValueError, match=r"uint8 \(0, 4, 3\)"):
        detector.predict([np.zeros((0, 4, 3), np.uint8)])
    assert detector_lib.read_image(tmp_path / "deep.png", 1023)[0, 0].tolist() == [224] * 3


def test_pixels_are_those_of_the_records(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    np.testing.assert_array_equal(detector_lib.read_image(tmp_path / "a.png"), pixels)
    cv2.imwrite(str(tmp_path / "grey.bmp"), pixels[..., 0])
    grey = np.repeat(pixels[..., :1], 3, axis=2)
    np.testing.assert_array_equal(detector_lib.read_image(tmp_path / "grey.bmp"), grey)


def test_boxes_hold_exactly_the_region_in_image_pixels():
    view = geometry.View((64, 64), (48, 48))  # the crop begins at 8, 8
    view_map = np.zeros((48, 48), np.float32)
    view_map[4:8, 10:20] = 2
    view_map[40:41, 40:41] = 3
    found = detector_lib.boxes(view_map, 1.0, view, (128, 256))
    # frame -> resized (+ 8) -> image (x 2 down, x 4 across)
    assert [(b.x, b.y, b.width, b.height, b.peak) for b in found] == [
        (4 * 48, 2 * 48, 4, 2, 3.0),
        (4 * 18, 2 * 12, 40, 8, 2.0),
    ]
    assert detector_lib.boxes(view_map, 3.0, view, (128, 256)) == []


def test_a_folder_of_several_runs_or_none_says_which_there_are(finished, tmp_path):
    names = r"2 runs|4 runs|5 runs"
    with pytest.raises(ValueError, match=rf"holds ({names}); name one of them: .*seed1"):
        mmrjax.load(finished[0])
    with pytest.raises(FileNotFoundError, match="holds no run"):
        mmrjax.load(tmp_path)
    assert restore.find_run(finished[0] / "mmr/parts/seed1").name == "seed1"


def test_a_run_that_is_not_fitted_or_has_another_teacher_is_refused(finished, tmp_path):
    run = tmp_path / "patchcore" / "parts" / "seed1"
    run.mkdir(parents=True)
    shutil.copy(finished[0] / "patchcore/parts/seed1/config.json", run)
    with pytest.raises(FileNotFoundError, match="is not fitted yet"):
        mmrjax.load(run)
    (run / "teacher.json").write_text('{"sha256": "00000000ff"}')
    with pytest.raises(ValueError, match=r"teacher weights of sha256 00000000…, random has None"):
        mmrjax.load(run)

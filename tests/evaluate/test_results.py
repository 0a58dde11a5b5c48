"""Evaluation of a toy model: both forms of the pixel metrics, both rules of ground truth, files."""

import contextlib
import csv
import json

import cv2
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import metrics
from mmrjax.data import geometry
from mmrjax.data.records import Records
from mmrjax.evaluate import results, scoring
from mmrjax.methods import base
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh as mesh_lib

BOUNDED = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_0.3")


def png(array):
    return cv2.imencode(".png", array)[1].tobytes()


def make_records(n=21):
    """Noisy pictures of different sizes; every third has a bright square, the first in a corner."""
    rng = np.random.default_rng(7)
    rows = []
    for i in range(n):
        size = (72 + 8 * (i % 2), 80)
        image, mask = rng.normal(90, 20, size), np.zeros(size, np.uint8)
        if i % 3 == 0:
            y, x = (0, 0) if i == 0 else rng.integers(24, 44, 2)  # the crop cuts the corner off
            mask[y : y + 4 if i == 0 else y + 14, x : x + 4 if i == 0 else x + 14] = 255
            image += 0.4 * mask
        elif i == 1:
            mask[20:30, 20:30] = 255  # of a good image: never read
        image = np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
        rows.append({"image": png(image), "mask": png(mask)})
    table = {
        "id": np.array([f"id{i:02d}" for i in range(n)]),
        "label": (np.arange(n) % 3 == 0).astype(int),
        "domain": np.where(np.arange(n) < 12, "same", "view"),
        "defect": np.where(np.arange(n) % 3 == 0, "spot", "good"),
        "group": np.array([f"g{i // 2}" for i in range(n)]),
        "has_mask": np.ones(n, bool),
    }
    return Records("toy", "part", table, "0", {"test": rows}, [("test", i) for i in range(n)])


class Brightness:
    """The brighter, the more anomalous."""

    name = "brightness"
    dtype = jnp.float32
    unroll = 1

    def precision(self):
        return contextlib.nullcontext()

    def predict(self, variables, frozen, images):
        return {"map": jnp.exp(images.mean(axis=-1)) + variables["bias"]}

    def score(self, maps):
        return maps.max(axis=(1, 2))


class BlindAtTheBorder(Brightness):
    """Takes the border of what it sees for anomalous, as networks that see nothing beyond it."""

    def __init__(self, is_peak):
        self.is_peak, self.seen = is_peak, []

    def predict(self, variables, frozen, images):
        self.seen.append(images.shape)
        border = jnp.pad(jnp.zeros([n - 2 for n in images.shape[1:3]]), 1, constant_values=9.0)
        return {"map": images.mean(axis=-1) + border}

    def score(self, maps):
        return super().score(maps) if self.is_peak else maps.std(axis=(1, 2))


def run(folder, *overrides, held_out=(), method=None):
    config = config_lib.load(
        "configs/folder.py",
        [
            "data.image_size=48,48",
            "data.resize=64,64",
            "eval.batch_size=8",
            "eval.bootstrap=40",
            "report.gallery=9",
            *overrides,
        ],
    )
    records = make_records()
    facts = {"seconds": {"train": 1.0}}
    mesh = mesh_lib.make_mesh(4)
    trained = base.Trained(method or Brightness(), {"bias": jnp.float32(0.0)}, {}, facts, mesh)
    return results.evaluate(trained, records, records.take(held_out), config, 3, folder)


def test_streaming_and_exact_forms_agree_within_the_stated_error(tmp_path):
    exact = run(tmp_path / "exact", "eval.pixel_metrics=exact", "eval.save_maps=true")
    found = run(tmp_path / "streaming", "eval.pixel_metrics=streaming", "eval.save_maps=true")
    assert exact["facts"]["pixel_metrics"] == "exact"
    assert exact["facts"]["error_at_most"] == {}
    assert found["facts"]["pixel_metrics"] == "streaming"
    errors = found["facts"]["error_at_most"]
    assert set(errors) == set(BOUNDED)
    assert max(errors.values()) < 0.1
    for domain, values in exact["metrics"]["toy/part"].items():
        streamed = found["metrics"]["toy/part"][domain]
        assert streamed["counts"] == values["counts"]
        assert "bounds" not in values
        assert streamed["tiny_recall"] == values["tiny_recall"]
        assert streamed["defects"] == values["defects"]
        for name in metrics.IMAGE_METRICS + metrics.PIXEL_METRICS:
            assert streamed[name] == pytest.approx(values[name], abs=errors.get(name, 1e-12)), name
            low, high = streamed["bounds"].get(name, [values[name]] * 2)
            assert low - 1e-12 <= values[name] <= high + 1e-12
    maps = [np.load(tmp_path / form / "maps" / "maps.npy") for form in ("exact", "streaming")]
    np.testing.assert_array_equal(*maps)
    assert (tmp_path / "exact/scores.csv").read_text() == (
        tmp_path / "streaming/scores.csv"
    ).read_text()
    galleries = [json.loads((tmp_path / f / "maps/gallery.json").read_text())
                 for f in ("exact", "streaming")]  # fmt: skip
    assert galleries[0]["items"] == galleries[1]["items"]
    assert galleries[1]["scale"] == pytest.approx(galleries[0]["scale"], rel=0.01)
    stored = json.loads((tmp_path / "streaming" / "results.json").read_text())
    assert stored == json.loads(json.dumps(found))


def test_auto_is_exact_up_to_the_stated_number_of_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "EXACT_PIXELS", 21 * 48 * 48)
    assert run(tmp_path)["facts"]["pixel_metrics"] == "exact"
    monkeypatch.setattr(scoring, "EXACT_PIXELS", 21 * 48 * 48 - 1)
    assert run(tmp_path)["facts"]["pixel_metrics"] == "streaming"


def labels(folder):
    with (folder / "scores.csv").open(newline="") as file:
        return [(row["label"], row["record_label"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("form", ["exact", "streaming"])
def test_the_mode_decides_over_labels_and_masks_and_both_label_sets_are_kept(tmp_path, form):
    field = f"eval.pixel_metrics={form}"
    standard = run(tmp_path / "standard", field)
    official = run(tmp_path / "mmr", field, "eval.metrics_mode=mmr")
    assert labels(tmp_path / "standard")[0] == ("anomaly", "anomaly")
    assert labels(tmp_path / "mmr")[0] == ("good", "anomaly")
    assert labels(tmp_path / "mmr")[1:] == labels(tmp_path / "standard")[1:]
    for result, mode, counts in ((standard, "standard", (7, 1)), (official, "mmr", (6, 0))):
        truth = result["facts"]["ground_truth"]
        assert truth["metrics_mode"] == mode
        assert truth["anomalies_without_defect_in_view"] == 1
        assert truth["of_these_counted_as_good"] == (mode == "mmr")
        found = result["metrics"]["toy/part"]["all"]["counts"]
        assert (found["anomaly"], found["empty_masks"]) == counts
    assert standard["facts"]["eval"] != official["facts"]["eval"]  # else it would not be redone


def test_the_official_masks_are_eroded(tmp_path):
    values = [
        run(tmp_path / mode, f"eval.metrics_mode={mode}")["metrics"]["toy/part"]["all"]
        for mode in ("standard", "mmr")
    ]
    assert values[0]["pixel_auroc"] != values[1]["pixel_auroc"]


@pytest.mark.parametrize("overlap", [0, 13])
def test_tiles_are_put_together_exactly(tmp_path, overlap):
    """A map that depends on each pixel alone is that of the whole image, whatever the tiles."""
    whole = run(tmp_path / "whole", "data.image_size=64,64", "eval.save_maps=true")
    fields = ("data.image_size=24,24", "data.tiling=true", f"data.tile_overlap={overlap}")
    tiled = run(tmp_path / "tiled", *fields, "eval.save_maps=true")
    maps = [np.load(tmp_path / name / "maps" / "maps.npy") for name in ("whole", "tiled")]
    assert maps[1].shape == (21, 64, 64)
    np.testing.assert_allclose(maps[1], maps[0], rtol=3e-7)  # the last bit of exp
    rows = [csv.DictReader((tmp_path / n / "scores.csv").open()) for n in ("whole", "tiled")]
    scores = [[float(row["score"]) for row in some] for some in rows]
    np.testing.assert_allclose(*scores, rtol=3e-7)
    assert (
        tiled["metrics"]["toy/part"]["all"]["counts"]
        == whole["metrics"]["toy/part"]["all"]["counts"]
    )
    assert tiled["facts"]["eval"]["view"] != whole["facts"]["eval"]["view"]


@pytest.mark.parametrize("is_peak", [True, False])
def test_the_score_of_tiles_is_that_of_the_map_they_make(tmp_path, is_peak):
    """Not that of a window's border, where others see more; the networks see windows only."""
    fields = ("data.image_size=24,24", "data.tiling=true", "data.tile_overlap=12")
    method = BlindAtTheBorder(is_peak)
    run(tmp_path, *fields, "eval.save_maps=true", method=method)
    maps = np.load(tmp_path / "maps" / "maps.npy")
    with (tmp_path / "scores.csv").open() as file:
        scores = np.array([float(row["score"]) for row in csv.DictReader(file)])
    if is_peak:
        np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    else:
        np.testing.assert_allclose(scores, maps.std(axis=(1, 2)), rtol=1e-5)
    assert maps[:, 12, 20].max() < 6.0  # a border there counts half; the image's own one in full
    assert maps[:, 0, 20].min() >= 9.0
    assert {shape[1:3] for shape in method.seen} == {(24, 24)}


def test_the_memory_of_tiles_does_not_grow_with_the_image():
    """What the program for one window needs is all that is ever needed beside the picture."""
    method = BlindAtTheBorder(True)
    trained = base.Trained(method, {"bias": jnp.float32(0.0)}, {}, {}, mesh_lib.make_mesh(1))
    for side in (48, 96, 480):
        view = geometry.View((side, side), (24, 24), overlap=12)
        predict = scoring.make_predict(trained, view)
        maps, scores = predict(trained.variables, {}, jnp.zeros((1, side, side, 3), jnp.uint8))
        assert maps.shape == (1, side, side)
        assert scores.shape == (1,)
    assert set(method.seen) == {(1, 24, 24, 3)}  # no other shape was ever traced


def test_held_out_images_give_a_threshold_and_rates_per_domain(tmp_path):
    fields = ("calibration.fraction=0.3", "calibration.target_fpr=0.25")
    found = run(tmp_path, *fields, held_out=[4, 7, 10, 13])["calibration"]
    scores = {r["id"]: float(r["score"]) for r in csv.DictReader((tmp_path / "scores.csv").open())}
    # images 6 and 7 are of one group, but of the held-out ones no two are: five ranks, the fourth
    assert found["threshold"] == sorted(scores[f"id{i:02d}"] for i in (4, 7, 10, 13))[3]
    assert found["promised_fpr"] == pytest.approx(0.2)
    domains = found["domains"]
    assert set(domains) == {"all", "same", "view"}
    assert domains["all"]["good"] == domains["same"]["good"] + domains["view"]["good"] == 14
    flagged = sum(s > found["threshold"] for name, s in scores.items() if int(name[2:]) % 3)
    assert domains["all"]["good_flagged"] == flagged
    scale = json.loads((tmp_path / "maps" / "gallery.json").read_text())["scale"]
    assert np.mean(scale) == pytest.approx(found["threshold"])  # here a score is a map's peak


def test_without_enough_held_out_images_the_reason_stands_where_the_threshold_would(tmp_path):
    few = run(tmp_path / "few", "calibration.fraction=0.3", held_out=[4, 7, 10, 13])["calibration"]
    assert few["threshold"] is None
    assert "4 held-out good images can promise false-positive rates from 20 %" in few["reason"]
    none = run(tmp_path / "none", "calibration.fraction=0.1")["calibration"]
    assert "19 are needed" in none["reason"]
    assert run(tmp_path / "off", "calibration.fraction=0")["calibration"] is None

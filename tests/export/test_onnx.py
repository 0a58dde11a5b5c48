"""An ONNX file says what the model says, for any batch, in a process that has no JAX."""

import functools
import itertools
import json
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from mmrjax import methods
from mmrjax.data import geometry
from mmrjax.export import __main__ as export
from mmrjax.methods import memory_bank, patchcore
from mmrjax.runs import detector as detector_lib
from mmrjax.runtime import mesh as mesh_lib

for name in ("torch", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason="needs the onnx extra")
pytestmark = pytest.mark.torch

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "score_onnx.py"
ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
wrong = {"jax", "torch", "mmrjax", "cv2", "flax", "onnx", "scipy"} & set(sys.modules)
assert not wrong, wrong
"""


@pytest.fixture(scope="module", params=["mmr", "patchcore"])
def exported(request, finished, tiny_raw, tmp_path_factory):
    """(detector, file, pictures) of a finished tiny run."""
    run = finished[0] / request.param / "parts" / "seed1"
    path = tmp_path_factory.mktemp("onnx") / "scorer.onnx"
    arguments = [f"--workdir={run}", f"--output={path}", f"--images={tiny_raw / 'bad'}"]
    assert export.main(arguments) == 0
    return detector_lib.load(run), path, sorted((tiny_raw / "bad").glob("0?.png"))


def test_maps_scores_and_verdicts_are_those_of_the_model_for_any_batch(exported):
    from mmrjax.export import onnx

    detector, path, pictures = exported
    view, expected = detector.view, detector.predict(pictures)
    images = np.stack(
        [
            geometry.view_image(
                detector_lib.read_image(p), view.resize, view.size, view.interpolation
            )
            for p in pictures
        ]
    )
    for rows in (slice(0, 1), slice(0, 4)):
        found = onnx.run(path, images[rows])
        for i, one in enumerate(expected[rows]):
            spread = np.ptp(one.view_map)  # far below 1 for the tiny memory bank
            allowed = min(1e-5, 1e-3 * spread)
            assert np.abs(found["map"][i] - one.view_map).max() <= allowed
            assert abs(found["score"][i] - one.score) <= allowed
            assert found["is_anomaly"][i] == one.is_anomaly
    about = json.loads(path.with_name("scorer.onnx.json").read_text())
    assert about["platforms"] == ["onnxruntime"]
    assert about["threshold"] == expected[0].threshold


def test_the_example_needs_neither_jax_nor_torch(exported, tmp_path):
    detector, path, pictures = exported
    command = [sys.executable, "-c", ALONE, EXAMPLE, path, *pictures]
    done = subprocess.run(
        list(map(str, command)), check=True, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(pictures)
    for line, one, picture in zip(lines, detector.predict(pictures), pictures, strict=True):
        score, verdict, name = line.split()
        assert float(score) == pytest.approx(one.score, rel=1e-4, abs=1e-5)
        assert verdict == ("anomaly" if one.is_anomaly else "good")
        assert name == str(picture)


def test_the_example_skips_what_it_cannot_read(exported, tmp_path):
    _, path, pictures = exported
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes()[:-40])
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "deep.tif")
    given = [tmp_path / "cut.png", pictures[0], tmp_path / "deep.tif", tmp_path]
    command = [sys.executable, EXAMPLE, path, *given]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [str(pictures[0])]
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == [
        str(given[i]) for i in (0, 2, 3)
    ]


def test_what_the_tiny_runs_do_not_have_is_traced_too(tiny_config, tmp_path):
    """Oblong images, all three layers, the patch score, a bank of two chunks, no threshold.

    And PatchCore's learnt distances, and maps by place.
    """
    from mmrjax.export import onnx

    config = tiny_config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {
            "data.image_size": (48, 80),
            "data.resize": (48, 80),
            "student.layers": (1, 2, 3),
            "patchcore.layers": (1, 3),
            "patchcore.whiten": 0.1,
            "patchcore.relative": True,
        }
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), np.uint8)
    one, two = {"scales": (1.5,), "score": "patch"}, {"scales": (0.4, 1.0), "score": "smoothed"}
    kinds = (("mmr", one), ("patchcore", one), ("patchcore", two))
    for (name, options), config.score.by_place in itertools.product(kinds, (False, True)):
        config.patchcore.update(options)
        detector = untrained(name, config)
        path = tmp_path / f"{name}{len(options['scales'])}_{config.score.by_place}.onnx"
        path.write_bytes(onnx.serialise(detector))
        found = onnx.run(path, images)
        assert set(found) == {"map", "score"}
        assert export.compare(detector, path, found, images, in_float32=True) <= export.TOLERANCE
        want = detector.predict(images)
        for i, one in enumerate(want):
            assert abs(found["score"][i] - one.score) <= 1e-4 * np.ptp(one.view_map)


def test_the_example_looks_through_the_windows_of_a_tiled_run(tiny_config, tmp_path):
    """With the model itself in the place of the file."""
    config = tiny_config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {"data.tiling": True, "data.tile_overlap": 16, "data.resize": (96, 144)}
    )
    detector = untrained("patchcore", config)
    predict = jax.jit(functools.partial(export._map_and_score, detector.trained.method))

    class Session:
        def run(self, names, feed):
            trained = detector.trained
            found = predict(trained.variables, trained.frozen, feed["images"])
            return [np.asarray(found[name]) for name in names]

    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = np.zeros((1, 64, 64, 3), np.uint8)
    found = dict(
        zip(("map", "score"), Session().run(("map", "score"), {"images": image}), strict=True)
    )
    about = json.loads(json.dumps(export.description(detector, found, True)))
    example = runpy.run_path(str(EXAMPLE))
    image = example["load_image"](str(tmp_path / "a.png"), about)
    score, found = example["score"](Session(), image, about)
    want = detector.predict([tmp_path / "a.png"])[0]
    assert found.shape == (96, 144)
    np.testing.assert_allclose(found, want.view_map, rtol=1e-4)
    assert score == pytest.approx(want.score, rel=1e-4)


def test_patchcore_on_a_vit_is_traced_too(tiny_config, tmp_path):
    from mmrjax.export import onnx

    config = tiny_config.copy_and_resolve_references()
    config.teacher.name = "dinov2_vits14"
    config.teacher.taps, config.patchcore.layers = (1, 2), (1, 2)
    detector = untrained("patchcore", config)
    path = tmp_path / "vit.onnx"
    path.write_bytes(onnx.serialise(detector))
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    found = onnx.run(path, images)
    assert export.compare(detector, path, found, images, in_float32=True) <= export.TOLERANCE


def untrained(name, config):
    """A detector with drawn weights, or a drawn memory bank."""
    method = methods.create(name, config)
    devices = mesh_lib.make_mesh(1)
    frozen, facts = method.load_frozen()
    variables, _ = method.init(jax.random.key(0), frozen)
    if name == "patchcore":
        rows = memory_bank.BANK_ROWS_PER_CHUNK + 5
        memories = {}
        for i, part in enumerate(patchcore.by_part(config.patchcore.scales), 1):
            bank = np.abs(np.random.default_rng(i).normal(size=(rows, config.patchcore.width)))
            memories[part] = memory = {"bank": jax.numpy.asarray(bank, "float32")}
            if config.patchcore.whiten:
                memory["whitening"] = jax.numpy.eye(bank.shape[1])[::-1] * 1.5
            if config.patchcore.relative:
                memory["expected"] = jax.numpy.linspace(0.5, 2.0, rows)
        memory = memory if len(memories) == 1 else memories
        variables = {**variables, "memory": memory}
    if config.score.by_place:
        rng = np.random.default_rng(2)
        layers = [f"layer{n}" for n in config.student.layers]
        layers = layers if name == "mmr" else patchcore.by_part(config.patchcore.scales)
        variables["places"] = {
            layer: {
                "mean": rng.uniform(0, 0.5, config.data.image_size).astype(np.float32),
                "std": rng.uniform(0.5, 1, config.data.image_size).astype(np.float32),
            }
            for layer in layers
        }
    trained = methods.base.Trained(method, variables, frozen, facts, devices)
    return detector_lib.Detector(trained, config)


def test_a_method_without_a_pytorch_form_is_refused(tiny_config):
    from mmrjax.export import onnx

    with pytest.raises(
        ValueError, match=r"knows mmr, mmr_plus, patchcore, not aminet; use --output=.*jax"
    ):
        onnx.serialise(untrained("aminet", tiny_config))


def test_a_model_beyond_two_gigabytes_is_refused(tiny_config, monkeypatch):
    from mmrjax.export import onnx

    monkeypatch.setattr(onnx, "LARGEST", 2**10)
    with pytest.raises(ValueError, match=r"GiB, an ONNX file holds 2; use --output=.*jax"):
        onnx.serialise(untrained("patchcore", tiny_config))

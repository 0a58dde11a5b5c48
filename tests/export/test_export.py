"""An exported scorer runs without this package, for any batch, and says what the model says."""

import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export as jax_export

from mmrjax import methods
from mmrjax.data import geometry
from mmrjax.evaluate import calibrate
from mmrjax.export import __main__ as export
from mmrjax.runs import detector as detector_lib
from mmrjax.runtime import mesh as mesh_lib

pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers: pip install '.[export]'")

ALONE = """
import sys, jax, numpy as np
images = np.load(sys.argv[2])
found = jax.export.deserialize(open(sys.argv[1], "rb").read()).call(images)
np.savez(sys.argv[3], **found)
assert not any(name.startswith(("mmrjax", "flax")) for name in sys.modules)
"""


@pytest.mark.parametrize("method", ["mmr", "patchcore"])
def test_the_file_alone_gives_the_scores_of_the_run(method, finished, tiny_raw, tmp_path, capsys):
    run, path = finished[0] / method / "parts" / "seed1", tmp_path / "scorer.jax"
    arguments = [f"--workdir={run}", f"--output={path}", f"--images={tiny_raw / 'bad'}"]
    assert export.main(arguments) == 0
    assert "loaded again" in capsys.readouterr().out
    pictures = sorted((tiny_raw / "bad").glob("0?.png"))[:3]
    detector = detector_lib.load(run)
    images = np.stack(
        [
            geometry.view_image(detector_lib.read_image(p), (64, 64), (64, 64), "bilinear")
            for p in pictures
        ]
    )
    np.save(tmp_path / "in.npy", images)
    command = [sys.executable, "-c", ALONE, path, tmp_path / "in.npy", tmp_path / "out.npz"]
    subprocess.run(list(map(str, command)), check=True, cwd=tmp_path)
    found = np.load(tmp_path / "out.npz")
    expected = detector.predict(pictures)
    for i, one in enumerate(expected):
        assert found["score"][i] == pytest.approx(one.score, rel=1e-4, abs=1e-5)
        np.testing.assert_allclose(found["map"][i], one.view_map, atol=1e-5 * max(1, one.score))
        assert found["is_anomaly"][i] == one.is_anomaly
    about = json.loads((tmp_path / "scorer.jax.json").read_text())
    assert about["threshold"] == expected[0].threshold
    assert about["calibration"]["promised_fpr"] <= 0.2
    assert jax_export.deserialize(path.read_bytes()).platforms == export.PLATFORMS


def test_a_file_that_differs_is_not_declared_good(finished, tmp_path, monkeypatch, capsys):
    run = finished[0] / "patchcore" / "parts" / "seed1"
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    assert export.main([f"--workdir={run}", f"--output={tmp_path / 'scorer.jax'}"]) == 1
    assert "differs from the model" in capsys.readouterr().err


def test_onnx_without_its_packages_names_what_to_install(finished, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else find(n, *a)
    )
    run, path = finished[0] / "patchcore" / "parts" / "seed1", tmp_path / "scorer.onnx"
    with pytest.raises(SystemExit) as ended:
        export.main([f"--workdir={run}", f"--output={path}"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "onnxruntime" in message
    assert "pip install 'mmrjax[onnx]'" in message
    assert not path.exists()


def test_a_file_of_unknown_kind_is_refused_before_work(finished, tmp_path, capsys):
    with pytest.raises(SystemExit):
        export.main([f"--workdir={finished[0]}", f"--output={tmp_path / 'scorer.pt'}"])
    assert "ends in .jax or .onnx" in capsys.readouterr().err


def test_another_calibration_sets_the_threshold(finished, tmp_path):
    run = finished[0] / "patchcore" / "parts" / "seed1"
    other = finished[0] / "patchcore" / "parts" / "seed2" / "calibration.json"
    output = tmp_path / "scorer.jax"
    assert export.main([str(run), f"--output={output}", f"--calibration={other}"]) == 0
    found = json.loads((tmp_path / "scorer.jax.json").read_text())["threshold"]
    assert found == calibrate.read(other).threshold(0.2)
    assert found != calibrate.read(run / "calibration.json").threshold(0.2)


def serialised(config, name):
    """What `export.serialise` makes of an untrained or just fitted method, called on its images."""
    mesh = mesh_lib.make_mesh(1)
    method = methods.create(name, config)
    frozen = method.load_frozen()[0]
    variables = method.init(jax.random.key(0), frozen)[0]
    images = np.random.default_rng(0).integers(0, 256, (4, *config.data.image_size, 3), np.uint8)
    pixels = geometry.to_unit(images)
    if method.fit is not None:
        variables = method.fit(variables, frozen, [(pixels, 4)], 4, jax.random.key(1))
    trained = methods.base.Trained(method, variables, frozen, {}, mesh)
    program = export.serialise(detector_lib.Detector(trained, config))
    found = jax_export.deserialize(program).call(images)
    return found["map"], method.predict(variables, frozen, pixels)["map"]


def test_learnt_distances_are_exported(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.update({"whiten": 0.1, "relative": True})
    np.testing.assert_allclose(*serialised(config, "patchcore"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mmr", "patchcore"])
def test_statistics_by_place_are_exported(tiny_config, name):
    config = tiny_config.copy_and_resolve_references()
    config.score.by_place = True
    np.testing.assert_allclose(*serialised(config, name), rtol=1e-3, atol=1e-2)


def test_a_scorer_in_bfloat16_is_exported_too(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.train.compute_dtype = "bfloat16"  # what "auto" is on accelerators
    np.testing.assert_allclose(*serialised(config, "mmr"), atol=0.02)


def test_a_file_holds_no_attention_of_one_platform(tiny_config, monkeypatch):
    kernels = []

    def kernel(name, dtype, head_width):
        kernels.append(name)
        return "xla"

    monkeypatch.setattr(methods.mmr, "attention_kernel", kernel)
    np.testing.assert_allclose(*serialised(tiny_config, "mmr"), atol=1e-4)
    assert kernels == ["auto", "xla"]  # of the run, and of what is written

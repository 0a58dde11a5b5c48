"""Anomaly maps: golden values, SciPy's Gaussian, torch's interpolation, closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from mmrjax import anomaly_map


@pytest.fixture(scope="module")
def golden(golden_dir):
    inputs = np.load(golden_dir / "maps" / "inputs.npz")
    nhwc = {k: jnp.asarray(v.transpose(0, 2, 3, 1)) for k, v in inputs.items()}
    student = {i + 1: nhwc[f"small__student{i}"] for i in range(3)}
    teacher = {i + 1: nhwc[f"small__teacher{i}"] for i in range(3)}
    return student, teacher, np.load(golden_dir / "maps" / "outputs.npz")


def test_map_and_score_equal_the_official_code(golden):
    student, teacher, want = golden
    total = sum(anomaly_map.cosine_maps(student, teacher, (64, 64)).values())
    np.testing.assert_allclose(total, want["small__amap_smooth"], atol=5e-6)
    np.testing.assert_allclose(anomaly_map.max_score(total), want["small__score"], atol=5e-6)


@pytest.mark.parametrize("shape", [(40, 33), (9, 7)])  # 9 x 7: shorter than the 33 taps
def test_gaussian_equals_scipy(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    got = anomaly_map.gaussian_matrix(shape[0]) @ x @ anomaly_map.gaussian_matrix(shape[1]).T
    np.testing.assert_allclose(got, scipy.ndimage.gaussian_filter(x, 4.0), atol=1e-12)


@pytest.mark.parametrize(("block", "peak"), [(1, 0.009948), (9, 0.5486), (16, 0.9090)])
def test_gaussian_of_a_block_has_the_known_peak(block, peak):
    x = np.zeros((1, 64, 64), np.float32)
    x[0, 24 : 24 + block, 24 : 24 + block] = 1
    smooth = anomaly_map.upsample_and_smooth(jnp.asarray(x), (64, 64), align_corners=True)
    assert float(smooth.max()) == pytest.approx(peak, rel=2e-3)


def test_interpolation_keeps_corners_only_when_asked():
    ramp = np.arange(4.0)
    kept = anomaly_map.upsample_matrix(4, 7, align_corners=True) @ ramp
    np.testing.assert_allclose(kept, np.arange(7) / 2)
    half = anomaly_map.upsample_matrix(4, 8, align_corners=False) @ ramp
    np.testing.assert_allclose(half, np.clip(np.arange(8) / 2 - 0.25, 0, 3))


def test_non_square_maps_keep_their_axes():
    x = np.zeros((1, 4, 8), np.float32)
    x[0, 0, 7] = 1
    got = np.asarray(anomaly_map.upsample_and_smooth(jnp.asarray(x), (32, 64), True))[0]
    assert got.shape == (32, 64)
    assert np.unravel_index(got.argmax(), got.shape) == (0, 63)

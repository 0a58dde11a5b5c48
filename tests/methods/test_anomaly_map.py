"""Anomaly maps: golden values, SciPy's Gaussian, torch's interpolation, closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from mmrjax.methods import anomaly_map, base, losses


@pytest.fixture(scope="module")
def golden(golden_dir):
    inputs = np.load(golden_dir / "maps" / "inputs.npz")
    nhwc = {k: jnp.asarray(v.transpose(0, 2, 3, 1)) for k, v in inputs.items()}
    student = {i + 1: nhwc[f"small__student{i}"] for i in range(3)}
    teacher = {i + 1: nhwc[f"small__teacher{i}"] for i in range(3)}
    return student, teacher, np.load(golden_dir / "maps" / "outputs.npz")


def test_map_and_score_equal_the_official_code(golden, agree):
    student, teacher, want = golden
    total = sum(anomaly_map.cosine_maps(student, teacher, (64, 64)).values())
    agree("smoothed map", total, want["small__amap_smooth"], 5e-6)
    agree("score", base.Method.score(None, total), want["small__score"], 5e-6)


def test_every_step_towards_the_map_equals_the_official_code(golden, agree):
    student, teacher, want = golden
    distances = [losses.cosine_distance(student[i], teacher[i]) for i in (1, 2, 3)]
    agree("distance maps", distances, [want[f"small__dist_scale{i}"] for i in range(3)], 2e-5)

    def raw(size):
        return [anomaly_map.upsample_and_smooth(d, size, True, sigma=0) for d in distances]

    upsampled = [want[f"small__amap_scale{i}"] for i in range(3)]
    agree("upsampled maps", raw((64, 64)), upsampled, 2e-5)
    agree("raw map, 64 px", sum(raw((64, 64))), want["small__amap_raw"], 2e-5)
    for size in (50, 224):
        got = sum(raw((size, size)))[:1]
        agree(f"raw map, {size} px", got, want[f"small__amap_raw_out{size}"], 2e-5)


@pytest.mark.parametrize(
    ("name", "sigma"), [("sigma1", 1.0), ("sigma4", 4.0), ("tiny_sigma4", 4.0)]
)
def test_gaussian_equals_the_golden_values(golden, agree, name, sigma):
    want = golden[2]
    x = want["gauss__tiny_in" if name.startswith("tiny") else "gauss__in"]
    rows, columns = (anomaly_map.gaussian_matrix(n, sigma) for n in x.shape)
    agree(f"Gaussian, {name}, float64", rows @ x @ columns.T, want[f"gauss__{name}"], 1e-12)
    single = anomaly_map.upsample_and_smooth(
        jnp.asarray(x[None], jnp.float32), x.shape, align_corners=True, sigma=sigma
    )
    agree(f"Gaussian, {name}, float32", single[0], want[f"gauss__{name}"], 5e-6)


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


@pytest.mark.parametrize(("n_in", "n_out"), [(48, 17), (48, 12), (7, 1), (9, 9), (5, 12)])
def test_resizing_is_that_of_pillow(n_in, n_out):
    x = np.random.default_rng(0).uniform(size=(3, n_in)).astype(np.float32)
    want = Image.fromarray(x).resize((n_out, 3), Image.Resampling.BILINEAR)
    matrix = anomaly_map.resize_matrix(n_in, n_out)
    np.testing.assert_allclose(x @ matrix.T, np.asarray(want), atol=1e-6)

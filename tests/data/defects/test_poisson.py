"""The Poisson solver against a sparse direct one, and the closed forms of MMR+'s section 7."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, sparse
from scipy.sparse import linalg

from mmrjax.data.defects import poisson
from mmrjax.runtime import mesh as mesh_lib

N = 32
blend = jax.jit(poisson.blend, static_argnames="max_rounds")  # one program for all cases


def oracle(source, target, region, mixed=False):
    """Equation 7 of Perez et al. pixel by pixel, [h, w] each, solved directly in float64."""
    h, w = region.shape
    pixels = list(zip(*np.nonzero(region), strict=True))
    number = {p: i for i, p in enumerate(pixels)}
    matrix, right = sparse.lil_matrix((len(pixels),) * 2), np.zeros(len(pixels))
    for (r, c), i in number.items():
        for q in ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)):
            if not (0 <= q[0] < h and 0 <= q[1] < w):
                continue
            matrix[i, i] += 1
            of_s, of_x = source[r, c] - source[q], target[r, c] - target[q]
            right[i] += of_x if mixed and abs(of_x) > abs(of_s) else of_s
            if q in number:
                matrix[i, number[q]] -= 1
            else:
                right[i] += target[q]
    result = target.astype(np.float64).copy()
    result[region] = linalg.spsolve(matrix.tocsr(), right)
    return result


def ragged(rng, n=N, size=10):
    """A star-shaped region around the middle of a window."""
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    angle, k = np.arctan2(y, x)[..., None], np.arange(2, 12)
    waves = 0.5 / k * rng.normal(size=10) * np.cos(k * angle + rng.uniform(0, 6.3, 10))
    return np.hypot(y, x) < size * np.clip(1 + waves.sum(-1), 0.2, 1.3)


def at_corner(rng):
    region = np.zeros((N, N), bool)
    region[:12, :20] = rng.random((12, 20)) < 0.8
    return region


REGIONS = {
    "blob": ragged,
    "one pixel": lambda rng: np.arange(N * N).reshape(N, N) == 500,
    "a pixel wide": lambda rng: np.eye(N, dtype=bool) & (np.arange(N) % 31 > 0),
    "scattered": lambda rng: np.pad(rng.random((N - 2, N - 2)) < 0.5, 1),
    "at the image's corner": at_corner,
    "nothing": lambda rng: np.zeros((N, N), bool),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def exact(source, target, region, mixed=False):
    """`blend` of one grey window [h, w] in float64."""
    grey = [jnp.asarray(a, jnp.float64)[None, ..., None] for a in (source, target)]
    found = blend(*grey, jnp.asarray(region)[None], jnp.asarray([mixed]), 1e-15, 80)
    return np.asarray(found)[0, ..., 0]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("case", REGIONS)
def test_equals_the_direct_solution(case, mixed):
    rng = np.random.default_rng(0)
    regions = np.stack([REGIONS[case](rng) for _ in range(3)])
    source, target = rng.uniform(0, 255, (2, 3, N, N, 2)).astype(np.float32)
    found = np.asarray(blend(source, target, regions, jnp.asarray([mixed] * 3), 1e-5))
    for i, region in enumerate(regions):
        for c in range(2):
            want = oracle(source[i, ..., c], target[i, ..., c], region, mixed)
            np.testing.assert_allclose(found[i, ..., c], want, atol=0.05)  # of 255 grey levels
    np.testing.assert_array_equal(found[~regions], target[~regions])


def test_each_window_of_a_batch_has_its_own_kind_of_gradient():
    rng = np.random.default_rng(1)
    regions = np.stack([ragged(rng)] * 2)
    source, target = rng.uniform(0, 255, (2, 2, N, N, 1)).astype(np.float32)
    found = blend(source, target, regions, jnp.array([False, True]), 1e-5)
    for i, mixed in enumerate((False, True)):
        want = oracle(source[i, ..., 0], target[i, ..., 0], regions[i], mixed)
        np.testing.assert_allclose(found[i, ..., 0], want, atol=0.05)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(3))
def test_closed_forms_hold_in_float64(seed):
    rng = np.random.default_rng(seed)
    x, region = rng.uniform(0, 1, (N, N)), ragged(rng)
    outside = x.copy()
    outside[region] = rng.uniform(0, 1, region.sum())
    line = np.add.outer(0.01 * np.arange(N), 0.02 * np.arange(N))
    np.testing.assert_allclose(exact(x + 0.37, x, region), x, atol=1e-12)  # an offset is no change
    np.testing.assert_allclose(exact(0 * x, line, region), line, atol=1e-12)  # harmonic
    np.testing.assert_allclose(exact(outside, x, region), outside, atol=1e-12)
    pit = x - 0.4 * region
    np.testing.assert_array_equal(exact(pit, x, region), pit)  # exactly, not to a tolerance
    np.testing.assert_allclose(exact(pit, x, region), oracle(pit, x, region), atol=1e-12)


def test_few_rounds_are_enough_for_a_large_region():
    rng = np.random.default_rng(2)
    region = np.stack([ragged(rng, 128, 45) for _ in range(2)])
    source, target = rng.uniform(0, 255, (2, 2, 128, 128, 1)).astype(np.float32)
    few = blend(source, target, region, tolerance=1e-7, max_rounds=8)
    many = blend(source, target, region, tolerance=1e-7, max_rounds=40)
    assert float(jnp.abs(few - many).max()) < 0.1


@pytest.mark.parametrize("size", [(5, 4), (21, 33), (39, 41)])  # one grid, one, two
@pytest.mark.parametrize("per_window", [False, True])
def test_windows_of_any_size_equal_the_direct_solution(size, per_window):
    rng = np.random.default_rng(3)
    region = rng.random((2, *size)) < 0.9  # reaches every side of the window
    source, target = rng.uniform(0, 255, (2, 2, *size, 1)).astype(np.float32)
    mixed = jnp.zeros(2, bool) if per_window else False  # two ways to the right side
    found = jax.jit(lambda s, x, r: poisson.blend(s, x, r, mixed, 1e-5))(source, target, region)
    for i in range(2):
        want = oracle(source[i, ..., 0], target[i, ..., 0], region[i])
        np.testing.assert_allclose(found[i, ..., 0], want, atol=0.05)
    np.testing.assert_array_equal(np.asarray(found)[~region], target[~region])


def test_the_default_tolerance_is_below_half_a_grey_level():
    rng = np.random.default_rng(4)
    regions = np.stack([ragged(rng, 56, 22) for _ in range(2)])
    source, target = rng.uniform(0, 255, (2, 2, 56, 56, 1)).astype(np.float32)
    found = blend(source, target, regions)
    for i, region in enumerate(regions):
        want = oracle(source[i, ..., 0], target[i, ..., 0], region)
        np.testing.assert_allclose(found[i, ..., 0], want, atol=0.5)


def test_and_in_the_largest_windows_with_the_larger_of_two_gradients():
    """Of textures as stains have them: smooth, with a little noise. In white noise it is 2.4."""
    rng = np.random.default_rng(5)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (2, 120, 120)), (0, 6, 6)) * 2
    target = (smooth + rng.normal(0, 4, smooth.shape)).astype(np.float32)[..., None]
    source = target[::-1] - 40
    regions = np.stack([ragged(rng, 120, 50) for _ in range(2)])
    found = blend(source, target, regions, mixed=True)
    for i, region in enumerate(regions):
        want = oracle(source[i, ..., 0], target[i, ..., 0], region, mixed=True)
        assert np.abs(want - target[i, ..., 0])[region].max() > 10  # a change that can be seen
        np.testing.assert_allclose(found[i, ..., 0], want, atol=0.5)


def test_elsewhere_than_on_cpu_the_same_comes_out_without_conditions(monkeypatch):
    rng = np.random.default_rng(5)
    region = np.stack([ragged(rng)] * 2)
    source, target = rng.uniform(0, 255, (2, 2, N, N, 1)).astype(np.float32)
    want = blend(source, target, region, False, 1e-5)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    plain = jax.jit(lambda s, x, r: poisson.blend(s, x, r, False, 1e-5))
    assert "cond[" not in str(jax.make_jaxpr(plain)(source, target, region))
    np.testing.assert_allclose(plain(source, target, region), want, atol=0.01)


def test_only_two_flags_cross_devices():
    mesh = mesh_lib.make_mesh(8)
    arrays = np.zeros((2, 16, 24, 24, 3), np.float32), np.zeros((16, 24, 24), bool)
    batch = mesh_lib.put_batch((*arrays[0], arrays[1], np.zeros(16, bool)), mesh)
    text = jax.jit(poisson.blend).lower(*batch).compile().as_text()
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    crossing = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    # Whether any region is there, and whether any window is unfinished.
    assert [(what.split("{")[0], how) for what, how in crossing] == [("pred[]", "all-reduce")] * 2

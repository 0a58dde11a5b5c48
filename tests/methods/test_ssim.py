"""SSIM against DRAEM's official code, and its closed forms."""

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.methods import ssim


@pytest.fixture(scope="module")
def golden(golden_dir):
    a, b = (
        formula.formula_image(f"draem.ssim_{x}", (2, 3, 64, 56)).astype(np.float64) for x in "ab"
    )
    pair = [x.transpose(0, 2, 3, 1) for x in (a, 0.7 * a + 0.3 * b)]
    return pair, dict(np.load(golden_dir / "draem" / "synthesis.npz"))


def test_map_value_and_gradient_are_those_of_the_official_code(golden, agree):
    pair, want = golden
    with jax.enable_x64():
        a, b = map(jnp.asarray, pair)
        got = np.asarray(ssim.ssim_map(a, b))
        slope = np.asarray(jax.grad(lambda a: 1 - ssim.ssim_map(a, b).mean())(a))
    agree("ssim map", got.transpose(0, 3, 1, 2)[:, :, ::2, ::2], want["ssim__map_s2"], 2e-7)
    agree("ssim", got.mean(), want["ssim__value"], 1e-7)
    slope = slope.transpose(0, 3, 1, 2)[:, :, ::4, ::4]
    agree("ssim gradient", slope, want["ssim__grad_img1_s4"], 1e-9)
    single = ssim.ssim_map(*(jnp.asarray(x, jnp.float32) for x in pair))
    agree("ssim in float32", single.mean(), want["ssim__value"], 2e-6)


def test_equal_images_have_similarity_one():
    a = jax.random.uniform(jax.random.key(0), (1, 32, 24, 3))
    np.testing.assert_allclose(ssim.ssim_map(a, a), 1, atol=1e-6)


def test_constants_have_the_closed_form_inside_the_border():
    a, b = 0.3, 0.8
    got = ssim.ssim_map(*(jnp.full((1, 32, 40, 1), x) for x in (a, b)))[0, 5:-5, 5:-5, 0]
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_a_checkerboard_and_its_negative_are_dissimilar():
    board = jnp.indices((32, 32)).sum(0)[None, ..., None] % 2.0
    assert ssim.ssim_map(board, 1 - board).mean() < 0

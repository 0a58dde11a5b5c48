"""Pooling and neighbourhoods of patch embeddings against PyTorch."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mmrjax.methods import anomaly_map, patch_embedding


@pytest.mark.parametrize(("n", "m"), [(4608, 1024), (9216, 1024), (2048, 1024), (10, 4), (3, 7)])
def test_adaptive_pooling_bins(n, m):
    matrix = patch_embedding.adaptive_pool_matrix(n, m)
    np.testing.assert_allclose(matrix.sum(axis=0), 1, rtol=1e-5)
    torch = pytest.importorskip("torch", reason="compares with torch's adaptive pooling")
    x = np.random.default_rng(0).standard_normal((2, n)).astype(np.float32)
    want = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x)[None], m)[0].numpy()
    np.testing.assert_allclose(x @ matrix, want, atol=1e-5)


def test_neighbourhoods_equal_torch_unfold():
    torch = pytest.importorskip("torch", reason="compares with torch's unfold")
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 3)).astype(np.float32)
    unfolded = torch.nn.functional.unfold(torch.from_numpy(x.transpose(0, 3, 1, 2)), 3, padding=1)
    want = unfolded.numpy().transpose(0, 2, 1).reshape(2, 5, 6, 27)
    np.testing.assert_array_equal(patch_embedding._neighbourhoods(jnp.asarray(x), 3), want)


def test_standardised_features_forget_what_all_places_share():
    """An offset and a gain per channel of the whole image, as light and background add."""
    rng = np.random.default_rng(0)
    x = rng.random((2, 6, 5, 4)).astype(np.float32)
    changed = x * np.float32([3, 1, 0.5, 2]) + np.float32([5, -1, 0, 9])
    maps = ({2: jnp.asarray(image)} for image in (x, changed))
    plain, shifted = (patch_embedding.embed(image, 3, 0, per_image=True) for image in maps)
    np.testing.assert_allclose(shifted, plain, atol=0.02)  # STEADY is a share of other variances
    once = np.asarray(patch_embedding.standardise(jnp.asarray(x)))
    np.testing.assert_allclose(once.mean(axis=(1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(once.std(axis=(1, 2)), 1, atol=0.01)
    empty = patch_embedding.standardise(jnp.full((1, 3, 3, 2), 7.0))
    np.testing.assert_array_equal(empty, 0)


def test_without_a_width_an_embedding_is_the_mean_of_each_channels_neighbourhood():
    rng = np.random.default_rng(0)
    fine, coarse = rng.random((1, 4, 6, 2)), rng.random((1, 2, 3, 3))
    maps = {2: jnp.asarray(fine, jnp.float32), 3: jnp.asarray(coarse, jnp.float32)}
    got = patch_embedding.embed(maps, 3, 0)
    assert got.shape == (1, 4, 6, 5)
    want = ndimage.uniform_filter(fine[0], (3, 3, 1), mode="constant")
    np.testing.assert_allclose(got[0, ..., :2], want, atol=1e-6)
    smooth = ndimage.uniform_filter(coarse[0], (3, 3, 1), mode="constant")
    rows, columns = (anomaly_map.resize_matrix(*n) for n in ((2, 4), (3, 6)))
    want = np.einsum("yh,xw,hwd->yxd", rows, columns, smooth)
    np.testing.assert_allclose(got[0, ..., 2:], want, atol=1e-6)

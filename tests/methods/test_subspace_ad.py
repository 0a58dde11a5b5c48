"""SubspaceAD beside a slow NumPy oracle, written from the equations of arXiv 2602.23013."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import decomposition

from mmrjax import methods
from mmrjax.methods import anomaly_map, subspace_ad
from mmrjax.runtime import config as config_lib


@pytest.fixture(scope="module")
def pictures():
    """12 pictures of 64 x 64 px: smooth grey ones; the last two have a bright square."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0.3, 0.6, 64)[None, :, None] * np.ones((12, 64, 1, 3))
    images = ramp * rng.uniform(0.8, 1.2, (12, 1, 1, 1)) + rng.normal(0, 0.02, (12, 64, 64, 3))
    images[10:, 20:36, 30:46] = 1
    return jnp.asarray(np.clip(images, 0, 1), jnp.float32)


def build(tiny_config, *overrides):
    config = tiny_config.copy_and_resolve_references()
    config_lib.override(config, overrides)
    method = methods.create("subspace_ad", config)
    return method, method.load_frozen()[0]


@pytest.fixture(scope="module", params=["resnet18", "vit_tiny_patch16_224"])
def fitted(request, tiny_config, pictures):
    method, frozen = build(tiny_config, f"teacher.name={request.param}", "subspace_ad.variance=0.9")
    batches = [(pictures[:6], 6), (pictures[4:10], 4)]
    return method, frozen, method.fit({"params": {}}, frozen, batches, 10, None)


def oracle_patches(method, frozen, images) -> np.ndarray:
    """Patches [b, h, w, d]: layers averaged if alike, else side by side on the finest grid."""
    features = method.teacher.apply(frozen["teacher"], method.teacher.normalise(images))
    maps = [np.asarray(features[layer], np.float64) for layer in sorted(features)]
    if len({x.shape for x in maps}) == 1:
        return np.mean(maps, axis=0)
    h, w = maps[0].shape[1:3]
    found = []
    for x in maps:
        rows = anomaly_map.upsample_matrix(x.shape[1], h, align_corners=False)
        columns = anomaly_map.upsample_matrix(x.shape[2], w, align_corners=False)
        found.append(np.einsum("yr,xc,brcd->byxd", rows, columns, x))
    return np.concatenate(found, axis=-1)


def oracle_subspace(patches: np.ndarray, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """(mean, components [k, d]) by a singular value decomposition, one component at a time."""
    mean = patches.mean(0)
    _, scale, components = np.linalg.svd(patches - mean, full_matrices=False)
    kept, so_far = 0, 0.0
    while so_far < variance * (scale**2).sum() * (1 - 1e-12):
        so_far += scale[kept] ** 2
        kept += 1
    return mean, components[:kept]


def test_maps_equal_the_oracle(fitted, pictures):
    method, frozen, variables = fitted
    good = oracle_patches(method, frozen, pictures[:10])  # 4 and 5 came once: 2 rows were padding
    seen = np.concatenate([good[:6], good[4:8]])
    mean, components = oracle_subspace(seen.reshape(-1, seen.shape[-1]), 0.9)
    assert variables["subspace"]["basis"].shape == components.T.shape
    queries = oracle_patches(method, frozen, pictures[8:])
    want = np.zeros(queries.shape[:3])
    for place in np.ndindex(want.shape):
        left = queries[place] - mean
        for component in components:
            left = left - (component @ (queries[place] - mean)) * component
        want[place] = left @ left
    want = np.asarray(anomaly_map.upsample_and_smooth(jnp.asarray(want), (64, 64), False))
    got = jax.jit(method.predict)(variables, frozen, pictures[8:])["map"]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * want.max())
    scores = method.score(got)
    assert min(scores[2:]) > max(scores[:2])  # the bright squares


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99, 1.0])
def test_components_are_those_of_scikit_learn(variance):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 8)) * 2.0 ** -np.arange(8)
    known = decomposition.PCA(variance if variance < 1 else None).fit(x)
    basis = subspace_ad.principal_components(np.cov(x.T, bias=True), variance)
    assert basis.shape == known.components_.T.shape
    np.testing.assert_allclose(np.abs(np.sum(basis * known.components_.T, axis=0)), 1, atol=1e-9)


def test_one_constant_picture_has_a_subspace_and_no_residual():
    basis = subspace_ad.principal_components(np.zeros((5, 5)), 0.99)
    assert basis.shape == (5, 1)
    x = jnp.ones((1, 2, 2, 5))
    assert not subspace_ad.residual(x, jnp.ones(5), jnp.asarray(basis, jnp.float32)).any()


def test_turned_copies_widen_the_subspace(tiny_config, pictures):
    plain, frozen = build(tiny_config, "subspace_ad.variance=0.9")
    more, _ = build(tiny_config, "subspace_ad.variance=0.9", "subspace_ad.rotations=3")
    batches = [(pictures[:2], 2)]
    a, b = (m.fit({"params": {}}, frozen, batches, 2, None) for m in (plain, more))
    quarter = jnp.rot90(pictures[:2], axes=(1, 2))
    before, after = (
        float(plain.score(plain.predict(x, frozen, quarter)["map"]).mean()) for x in (a, b)
    )
    assert after < 0.9 * before


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_quarter_turns_move_pixels_whole(pictures, quarters):
    got = subspace_ad.turned(pictures[:2], jnp.float32(90 * quarters))
    np.testing.assert_allclose(got, jnp.rot90(pictures[:2], quarters, axes=(1, 2)), atol=1e-4)


def test_the_score_is_the_mean_of_the_highest_share(tiny_config):
    maps = jnp.asarray(np.random.default_rng(0).permutation(4096).reshape(1, 64, 64), jnp.float32)
    method, _ = build(tiny_config)
    assert method.score(maps)[0] == pytest.approx(np.arange(4096)[-40:].mean())
    method, _ = build(tiny_config, "subspace_ad.score_share=0")
    assert method.score(maps)[0] == 4095


def test_shares_that_cannot_be_are_refused(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    for field, value in (("variance", 99.0), ("score_share", 1.5), ("rotations", -1)):
        with config.unlocked():
            own = config.copy_and_resolve_references()
            own.subspace_ad[field] = value
        with pytest.raises(ValueError, match=f"subspace_ad.{field}"):
            subspace_ad.SubspaceAD.check(own)

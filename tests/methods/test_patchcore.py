"""PatchCore's parts against slow oracles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from mmrjax.methods import anomaly_map, memory_bank, patchcore


def unit(images):
    return jnp.asarray(images) / 255.0


def test_embedding_has_one_row_per_patch_of_the_finer_layer(tiny_config):
    method = patchcore.PatchCore(tiny_config)
    frozen, _ = method.load_frozen()
    got = jax.jit(method.embed, static_argnums=2)(frozen, jnp.zeros((2, 64, 96, 3)), 1.0)
    assert got.shape == (2, 8, 12, tiny_config.patchcore.width)


def test_an_enlarged_image_has_a_finer_grid_and_a_map_of_its_own_size(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.scales = (1.5,)
    method = patchcore.PatchCore(config)
    frozen, _ = method.load_frozen()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    embed = jax.jit(method.embed, static_argnums=2)
    assert embed(frozen, jnp.asarray(images) / 255.0, 1.5).shape[1:3] == (12, 18)
    variables = method.fit({"params": {}}, frozen, [(unit(images), 2)], 2, jax.random.key(1))
    found = jax.jit(method.predict)(variables, frozen, jnp.asarray(images) / 255.0)
    assert found["map"].shape == (2, 64, 96)


@pytest.mark.parametrize("score", ["smoothed", "patch"])
def test_maps_of_several_scales_are_those_of_each_added_up(tiny_config, score):
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    other = jnp.asarray(255 - images, jnp.float32) / 255.0
    found = {}
    for scales in ((1.0,), (0.5,), (1.0, 0.5)):
        config = tiny_config.copy_and_resolve_references()
        config.patchcore.scales, config.patchcore.score = scales, score
        config.patchcore.whiten, config.patchcore.relative = 0.1, True
        config.patchcore.coreset = 0.2
        method = patchcore.PatchCore(config)
        frozen, _ = method.load_frozen()
        variables = method.fit({"params": {}}, frozen, [(unit(images), 4)], 4, jax.random.key(1))
        found[scales] = jax.jit(method.predict)(variables, frozen, other)
    one, half, both = found.values()
    assert not np.allclose(one["map"], half["map"], rtol=0.1)
    np.testing.assert_allclose(both["parts"]["patches1"], one["map"], rtol=1e-5)
    np.testing.assert_allclose(both["parts"]["patches2"], half["map"], rtol=1e-5)
    np.testing.assert_allclose(both["map"], one["map"] + half["map"], rtol=1e-5)
    if score == "patch":  # the maximum of raw distances, each scale's in its own cells
        np.testing.assert_allclose(both["scored"], one["scored"] + half["scored"], rtol=1e-5)
        assert (np.asarray(one["scored"]).max((1, 2)) > np.asarray(one["map"]).max((1, 2))).all()
    else:
        assert "scored" not in both


def test_two_scales_that_are_one_in_whole_cells_are_refused(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.scales = (0.5, 0.55)
    method = patchcore.PatchCore(config)
    with pytest.raises(ValueError, match=r"scales=\(0\.5, 0\.55\).*32 x 32, 32 x 32; two are"):
        method.fit({"params": {}}, {}, [], 0, jax.random.key(1))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.313])
@pytest.mark.parametrize("corner", [16, 104, 152])
def test_a_defect_raises_the_map_where_it_is(tiny_config, scale, corner):
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.scales = (scale,)
    config.teacher.name, config.teacher.weights = "efficientnet_lite0", "embedded"
    method = patchcore.PatchCore(config)
    frozen, _ = method.load_frozen()
    noise = np.random.default_rng(0).integers(0, 16, (4, 208, 208, 3), dtype=np.uint8)
    good = noise + np.uint8(128)
    variables = method.fit({"params": {}}, frozen, [(unit(good), 4)], 4, jax.random.key(1))
    defective = good[:1].copy()
    defective[0, corner : corner + 40, corner : corner + 40] = 255
    found = jax.jit(method.predict)(variables, frozen, jnp.asarray(defective) / 255.0)["map"][0]
    weight = np.asarray(np.maximum(found - np.quantile(found, 0.9), 0), np.float64)
    rows, columns = np.indices(weight.shape)
    for places in (rows, columns):  # the centre; 26 px are a cell of the smallest scale
        assert abs((weight * places).sum() / weight.sum() - corner - 20) < 14


def test_a_small_scale_is_smoothed_as_widely_in_what_the_teacher_sees(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.scales, config.patchcore.layers = (0.5,), (1,)
    method = patchcore.PatchCore(config)
    frozen, _ = method.load_frozen()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    variables = method.fit({"params": {}}, frozen, [(unit(images[:1]), 1)], 1, jax.random.key(1))
    image = jnp.asarray(images[1:]) / 255.0
    found = jax.jit(method.predict)(variables, frozen, image)["map"][0]
    patches = method.embed(frozen, image, 0.5)
    assert patches.shape[1:3] == (8, 8)
    distance = memory_bank.nearest_squared_distance(
        patches.reshape(64, -1), variables["memory"]["bank"]
    )
    matrix = anomaly_map.upsample_matrix(8, 64, align_corners=False)
    raw = matrix @ np.asarray(distance).reshape(8, 8) @ matrix.T
    want = scipy.ndimage.gaussian_filter(raw, sigma=2 * anomaly_map.GAUSSIAN_SIGMA)
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_candidates_are_drawn_evenly_from_every_image(tiny_config):
    """Each image has a grey of its own: the bank tells which images its rows come from."""
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.candidates = 24
    config.patchcore.coreset = 1.0  # more than there are candidates: all of them
    method = patchcore.PatchCore(config)
    frozen, _ = method.load_frozen()
    grey = np.linspace(20, 230, 6).astype(np.uint8)[:, None, None, None]
    images = np.broadcast_to(grey, (6, 64, 64, 3))
    batches = [
        (unit(images[:4]), 4),
        (unit(np.concatenate([images[4:], images[4:]])), 2),
    ]  # one is filled up
    bank = method.fit({"params": {}}, frozen, batches, 6, jax.random.key(1))["memory"]["bank"]
    assert bank.shape == (24, config.patchcore.width)
    embed = jax.jit(method.embed, static_argnums=2)
    every = np.asarray(embed(frozen, jnp.asarray(images) / 255.0, 1.0))
    every = every.reshape(6, -1, 1, bank.shape[1])
    distance = np.square(every - np.asarray(bank)).sum(-1).min(1)  # of image, of row
    assert distance.min(0).max() < 1e-6
    np.testing.assert_array_equal(np.bincount(distance.argmin(0)), [4] * 6)


def test_as_many_candidates_as_patches_are_all_of_them(tiny_config):
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    banks = []
    for candidates in (0, 3 * 64):
        config = tiny_config.copy_and_resolve_references()
        config.patchcore.candidates = candidates
        method = patchcore.PatchCore(config)
        frozen, _ = method.load_frozen()
        found = method.fit({"params": {}}, frozen, [(unit(images), 3)], 3, jax.random.key(1))
        banks.append(np.asarray(found["memory"]["bank"]))
    np.testing.assert_array_equal(*banks)


@pytest.mark.parametrize("options", [{"whiten": 1.0}, {"relative": True}])
def test_an_option_changes_the_map_and_leaves_training_patches_at_zero(tiny_config, options):
    """The bank is treated as the queries are."""
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.coreset = 1.0
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    new = jnp.asarray(images) / 255.0
    maps = []
    for more in ({}, options):
        config.patchcore.update(more)
        method = patchcore.PatchCore(config)
        frozen, _ = method.load_frozen()
        variables = method.fit({"params": {}}, frozen, [(unit(images), 4)], 4, jax.random.key(1))
        assert set(variables["memory"]) - {"bank", "image"} == (
            {{"whiten": "whitening", "relative": "expected"}[name] for name in more}
        )
        there = np.asarray(jax.jit(method.predict)(variables, frozen, new)["map"])
        other = np.asarray(jax.jit(method.predict)(variables, frozen, new[:, ::-1])["map"])
        assert there.max() < 1e-3 * other.mean()
        maps.append(other / other.mean())
    assert np.abs(maps[0] - maps[1]).max() > 0.01


def test_expected_distances_leave_the_choice_of_the_bank_alone(tiny_config):
    """More patches are looked at, the candidates are the same."""
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.candidates, config.patchcore.coreset = 24, 0.04
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    banks = []
    for relative in (False, True):
        config.patchcore.relative = relative
        method = patchcore.PatchCore(config)
        frozen, _ = method.load_frozen()
        found = method.fit({"params": {}}, frozen, [(unit(images), 4)], 4, jax.random.key(1))
        banks.append(np.asarray(found["memory"]["bank"]))
    np.testing.assert_array_equal(*banks)


@pytest.mark.parametrize("options", [{"whiten": 1.0}, {"relative": True}])
def test_images_held_against_each_other_must_be_two(tiny_config, options):
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.update(options)
    method = patchcore.PatchCore(config)
    frozen, _ = method.load_frozen()
    images = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(ValueError, match="add images"):
        method.fit({"params": {}}, frozen, [(unit(images), 1)], 1, jax.random.key(1))

"""methods/by_place.py: statistics of places, and maps in their standard deviations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import methods
from mmrjax.methods import base, by_place


class Grey(base.Method):
    """The map is the picture's red; the score is its mean, which nothing by place keeps."""

    name = "grey"

    def predict(self, variables, frozen, images):
        half = images[..., 0] / 2
        return {"map": 2 * half, "parts": {"a": half, "b": half}}

    def score(self, maps):
        return maps.mean((1, 2))


def pictures(n, seed=0):
    """Uint8 [n, 8, 8, 3]; the left half is quiet, the right one busy and brighter."""
    rng = np.random.default_rng(seed)
    spread = np.where(np.arange(8) < 4, 2.0, 20.0)[:, None]
    value = np.where(np.arange(8) < 4, 60.0, 150.0)[:, None] + spread * rng.normal(
        size=(n, 8, 8, 1)
    )
    return np.broadcast_to(value.round(), (n, 8, 8, 3)).astype(np.uint8)


@pytest.fixture
def grey(tiny_config):
    return by_place.of(Grey)(tiny_config)


def fit(method, *batches):
    count = sum(n for _, n in batches)
    batches = [(jnp.asarray(images) / 255.0, n) for images, n in batches]
    return method.fit({"params": {}}, {}, batches, count, jax.random.key(0))


def test_statistics_are_those_of_all_images_at_once():
    rng = np.random.default_rng(0)
    maps = rng.normal(1000, 1e-2, (13, 5, 6)).astype(np.float32)  # a small spread on a large mean
    parts = [{"one": maps[:6]}, {"one": maps[6:12]}, {"one": maps[12:]}]
    found = by_place.statistics(iter(parts))["one"]
    np.testing.assert_allclose(found["mean"], maps.mean(0, np.float64), rtol=1e-6)
    np.testing.assert_allclose(found["std"], maps.std(0, dtype=np.float64), rtol=1e-4)


def test_a_quiet_place_has_a_tenth_of_the_mean_deviation_and_never_none():
    maps = np.zeros((4, 1, 2), np.float32)
    maps[:, 0, 1] = [-1, 1, -1, 1]
    std = np.asarray(by_place.statistics([{"one": maps}])["one"]["std"])
    np.testing.assert_allclose(std, [[0.05, 1.0]])
    constant = by_place.statistics([{"one": np.ones((3, 2, 2), np.float32)}])["one"]["std"]
    assert (np.asarray(constant) > 0).all()


def test_rows_that_fill_a_batch_up_do_not_count(grey):
    images = pictures(6)
    filled = np.concatenate([images[4:], 0 * images[:2]])
    whole, parts = fit(grey, (images, 6)), fit(grey, (images[:4], 4), (filled, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


def test_a_defect_at_a_quiet_place_beats_a_larger_difference_at_a_busy_one(grey):
    variables = fit(grey, (pictures(32), 32))
    new = pictures(2, seed=1).astype(np.float32)
    new[0, 2, 1] += 20  # ten deviations where it is quiet
    new[1, 6, 6] = 150 + 40  # two where it is not
    found = grey.predict(variables, {}, jnp.asarray(new) / 255)
    assert np.unravel_index(found["map"][0].argmax(), (8, 8)) == (2, 1)
    score = grey.score(found["map"])
    assert score[0] > 2 * score[1]
    np.testing.assert_allclose(score, np.asarray(found["map"]).max((1, 2)))
    np.testing.assert_allclose(found["map"], sum(found["parts"].values()), rtol=1e-6)


def test_training_maps_have_mean_zero_and_deviation_one(grey):
    images = pictures(20)
    parts = grey.predict(fit(grey, (images, 20)), {}, jnp.asarray(images) / 255.0)["parts"]
    np.testing.assert_allclose(np.asarray(parts["a"]).mean(0), 0, atol=1e-4)
    busy = np.asarray(parts["a"]).std(0)[4:]
    np.testing.assert_allclose(busy, 1, atol=1e-4)


def test_a_single_image_and_a_bank_of_all_patches_are_refused(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.score.by_place = True
    kinds = {name: by_place.of(methods.METHODS[name]) for name in ("mmr", "patchcore")}
    kinds["mmr"].check_run(config, 2)
    with pytest.raises(ValueError, match=r"score.by_place .* needs two or more, not 1"):
        kinds["mmr"].check_run(config, 1)
    with pytest.raises(ValueError, match=r"coreset=0.2 .* give at most 0.1, or score.by_place"):
        kinds["patchcore"].check_run(config, 9)


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_any_method_learns_places_after_its_own_training_or_fit(tiny_config, name):
    config = tiny_config.copy_and_resolve_references()
    plain = methods.create(name, config)
    config.score.by_place = True
    method = methods.create(name, config)
    assert isinstance(method, methods.METHODS[name])
    assert method.stage_names == plain.stage_names
    frozen = method.load_frozen()[0]
    variables = method.init(jax.random.key(0), frozen)[0]
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    scaled = jnp.asarray(images) / 255.0
    fitted = method.fit(variables, frozen, [(scaled, 5)], 5, jax.random.key(1))
    own = {"patchcore": {"memory"}, "subspace_ad": {"subspace"}}  # of the method's own fit
    assert set(fitted) - set(variables) == own.get(name, set()) | {"places"}
    before = jax.jit(plain.predict)(fitted, frozen, scaled)["parts"]
    after = jax.jit(method.predict)(fitted, frozen, scaled)
    for part, maps in before.items():
        maps = np.asarray(maps, np.float64)
        std = np.maximum(maps.std(0), by_place.SMALLEST * maps.std(0).mean())
        wanted = (maps - maps.mean(0)) / std
        np.testing.assert_allclose(after["parts"][part], wanted, atol=2e-2)

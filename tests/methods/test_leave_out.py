"""Leaving training images out of a bank, against banks that were built without the images."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import methods
from mmrjax.data import geometry
from mmrjax.data.records import Records
from mmrjax.evaluate import guarantees, scoring
from mmrjax.methods import anomaly_map, base, memory_bank
from mmrjax.train import loop

GROUPS = np.array(list("abacddefgh"))  # of ten images
OPTIONS = {
    "plain": (),
    "whitened": ("whiten",),
    "relative": ("relative",),
    "scales": ("scales",),
    "all": ("whiten", "relative", "scales", "by_place"),
}


@pytest.fixture(autouse=True)
def small_bank(monkeypatch):
    """Each image chooses 12 of its 64 patches, not all."""
    monkeypatch.setattr(memory_bank, "SMALL_BANK", 0)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    level = rng.integers(40, 200, (10, 4, 4, 3)).repeat(16, 1).repeat(16, 2)
    return jnp.asarray(
        np.clip(level + rng.normal(0, 8, (10, 64, 64, 3)), 0, 255) / 255, jnp.float32
    )


def embed(frozen, images, scale):
    """Patches float32 [b, h, w, 32] of cells of 8 px at scale 1; a teacher would take minutes."""
    b, h, w, _ = images.shape
    rows, columns = (round(side * scale / 8) for side in (h, w))
    cells = images.reshape(b, 2 * rows, h // rows // 2, 2 * columns, w // columns // 2, 3)
    cells = cells.mean((2, 4)).reshape(b, rows, 2, columns, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    matrix = jnp.asarray(np.random.default_rng(3).normal(size=(12, 32)), jnp.float32)
    return jnp.matmul(cells.reshape(b, rows, columns, 12), matrix, precision=memory_bank.EXACT)


def bank(tiny_config, coreset_of, options=()):
    """(method with the patches above, its frozen weights)."""
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.coreset_of = coreset_of
    config.patchcore.whiten = 0.1 * ("whiten" in options)
    config.patchcore.relative = "relative" in options
    config.patchcore.scales = (0.5, 1.0) if "scales" in options else (1.0,)
    config.score.by_place = "by_place" in options
    method = methods.create("patchcore", config)
    method.embed, method._embed = embed, jax.jit(embed, static_argnums=2)
    method.load_frozen = lambda: ({}, {})
    return method, {}


def fit(method, frozen, images):
    return method.fit(
        {"params": {}}, frozen, [(images, len(images))], len(images), jax.random.key(1)
    )


def away_of(groups):
    return groups[:, None] == groups


def rows_kept(memory, image):
    """A memory without the rows of the images whose numbers are given."""
    if "bank" not in memory:
        return {part: rows_kept(own, image) for part, own in memory.items()}
    kept = ~np.isin(memory["image"], image)
    cut = {name: memory[name][kept] for name in ("bank", "image", "expected") if name in memory}
    return {**memory, **cut}


@pytest.mark.parametrize(
    ("coreset_of", "name"), [*(("image", name) for name in OPTIONS), ("all", "plain")]
)
def test_it_is_the_bank_without_the_rows_of_the_group(tiny_config, images, coreset_of, name):
    """With any option: the other rows, the whitening and the expected distances stay."""
    method, frozen = bank(tiny_config, coreset_of, OPTIONS[name])
    variables = fit(method, frozen, images)
    got = method.leave_out(variables, frozen, images, away_of(GROUPS))
    plain = method.predict(variables, frozen, images)["map"]
    for group in ("a", "d"):
        own = np.flatnonzero(GROUPS == group)
        without = {**variables, "memory": rows_kept(variables["memory"], own)}
        want = method.predict(without, frozen, images[own])
        np.testing.assert_allclose(got["map"][own], want["map"], rtol=1e-3, atol=1e-3)
        assert set(got["parts"]) == set(want["parts"])
    assert (np.asarray(got["map"]).max((1, 2)) > np.asarray(plain).max((1, 2))).all()


def slow_maps(method, frozen, train, test, rows):
    """Maps of `test` by a bank of `train` that NumPy builds and searches, patch by patch."""
    known, new = (np.asarray(embed(frozen, x, 1.0), np.float64) for x in (train, test))
    width = known.shape[-1]
    projection = method.config.patchcore.projection
    key, _ = jax.random.split(jax.random.key(1))
    matrix = jax.random.uniform(key, (width, projection), minval=-1.0, maxval=1.0)
    matrix = np.asarray(matrix, np.float64)
    chosen = []
    for patches in known.reshape(len(known), -1, width):
        seen = patches @ matrix
        far = [np.square(p - seen.mean(0)).sum() for p in seen]
        for _ in range(rows):
            i = int(np.argmax(far))
            chosen.append(patches[i])
            far = [min(f, np.square(p - seen[i]).sum()) for f, p in zip(far, seen, strict=True)]
            far[i] = -1.0
    chosen = np.array(chosen)
    distance = [[np.square(chosen - p).sum(1).min() for p in x.reshape(-1, width)] for x in new]
    grid = jnp.asarray(distance, jnp.float32).reshape(len(new), 8, 8)
    return anomaly_map.upsample_and_smooth(grid, (64, 64), False)


def test_rows_chosen_by_each_image_are_as_if_the_group_had_never_been_there(tiny_config, images):
    """The proven case: leaving out equals building a bank of the other images alone."""
    method, frozen = bank(tiny_config, "image")
    assert method.leaves_out_exactly(method.config)
    variables = fit(method, frozen, images)
    got = method.leave_out(variables, frozen, images, away_of(GROUPS))["map"]
    for group in ("a", "d"):
        own = GROUPS == group
        want = slow_maps(method, frozen, images[~own], images[own], rows=12)  # 0.2 of 64
        np.testing.assert_allclose(got[own], want, rtol=1e-3, atol=1e-4)
        again = fit(method, frozen, images[~own])
        np.testing.assert_allclose(
            got[own], method.predict(again, frozen, images[own])["map"], rtol=1e-3, atol=1e-4
        )


def test_rows_chosen_among_all_images_differ_without_the_group_and_nothing_is_proven(
    tiny_config, images
):
    """The other images would have chosen rows in place of those that are left out."""
    method, frozen = bank(tiny_config, "all")
    assert not method.leaves_out_exactly(method.config)
    variables = fit(method, frozen, images)
    got = method.leave_out(variables, frozen, images, away_of(GROUPS))["map"]
    own = GROUPS == "d"
    again = fit(method, frozen, images[~own])
    refitted = method.predict(again, frozen, images[own])["map"]
    assert not np.allclose(got[own], refitted, rtol=0.01)


@pytest.mark.parametrize(("coreset_of", "coreset"), [("image", 0.2), ("all", 1.0)])
def test_an_image_more_lowers_scores_where_a_promise_is_proven(
    tiny_config, images, coreset_of, coreset
):
    method, frozen = bank(tiny_config, coreset_of)
    method.config.patchcore.coreset = coreset
    assert method.leaves_out_exactly(method.config)
    fewer, more = fit(method, frozen, images[:4]), fit(method, frozen, images[:5])
    maps = [method.predict(variables, frozen, images[5:])["map"] for variables in (fewer, more)]
    assert (maps[1] <= maps[0] + 1e-3).all()  # maps of 4: rounding of the patches' products
    assert (maps[1] < maps[0] - 0.1).any()


@pytest.mark.parametrize(
    "field",
    ["patchcore.whiten=0.1", "patchcore.relative=true", "score.by_place=true",
     "patchcore.candidates=100", "patchcore.coreset_of=all"],
)  # fmt: skip
def test_what_all_images_teach_is_not_proven(tiny_config, field):
    config = tiny_config.copy_and_resolve_references()
    config.patchcore.coreset_of = "image"
    kind = methods.METHODS["patchcore"]
    assert kind.leaves_out_exactly(config)
    name, value = field.split("=")
    value = {"true": True, "all": "all"}.get(value) or float(value)
    config.update_from_flattened_dict({name: int(value) if "candidates" in name else value})
    assert not kind.leaves_out_exactly(config)


def grouped(count, groups):
    """Good pictures of random blocks with some grain, of 96 x 64 px."""
    rng, source = np.random.default_rng(1), []
    mask = cv2.imencode(".png", np.zeros((96, 64), np.uint8))[1].tobytes()
    for _ in range(count):
        level = rng.integers(40, 200, (6, 4, 3)).repeat(16, 0).repeat(16, 1)
        image = np.clip(level + rng.normal(0, 8, level.shape), 0, 255).astype(np.uint8)
        source.append({"image": cv2.imencode(".png", image)[1].tobytes(), "mask": mask})
    empty = np.full(count, "")
    table = {"id": np.arange(count).astype(str), "group": np.asarray(groups)}
    table |= {"domain": empty, "defect": empty, "part": empty}
    table |= {"label": np.zeros(count, int), "has_mask": np.zeros(count, bool)}
    rows = [("train", i) for i in range(count)]
    return Records("toy", "all", table, "digest", {"train": source}, rows)


@pytest.mark.parametrize("overrides", [{}, {"data.tiling": True, "data.resize": (96, 64)}])
def test_a_run_scores_each_training_image_without_its_part(tiny_config, tmp_path, overrides):
    """Also in tiles, whose windows reach `fit` in another order than the images."""
    method, _ = bank(tiny_config, "image")
    config = method.config
    config.update_from_flattened_dict({**overrides, "eval.batch_size": 8})
    records = grouped(10, GROUPS)
    trained = loop.train(method, records, 0, tmp_path)
    found = scoring.Scorer(trained, config).left_out(records)
    assert found.guarantee == guarantees.FULL
    assert found.groups == GROUPS.tolist()
    for group in ("a", "d"):
        rest = grouped(10, GROUPS).take(np.flatnonzero(group != GROUPS))
        other = loop.train(method, rest, 0, tmp_path / group)
        own = records.take(np.flatnonzero(group == GROUPS))
        want = scoring.Scorer(other, config).calibration(own)
        for name in ("scores", "peaks"):
            got = np.asarray(getattr(found, name))[group == GROUPS]
            np.testing.assert_allclose(got, getattr(want, name), rtol=1e-3, atol=1e-4)


class Windows(base.Method):
    """Keeps what `fit` is shown."""

    name, title = "toy", "Toy"

    def load_frozen(self):
        return {}, {}

    def init(self, key, frozen):
        return {"params": {}}, {}

    def fit(self, variables, frozen, batches, count, key):
        shown = np.concatenate([np.asarray(images)[:real] for images, real in batches])
        assert len(shown) == count
        return {**variables, "shown": jnp.asarray(shown), "parts": jnp.asarray(batches.parts)}

    def leave_out(self, variables, frozen, images, away):
        return self.predict(variables, frozen, images)


def test_the_record_of_every_window_is_noted(tiny_config, tmp_path):
    config = tiny_config.copy_and_resolve_references()
    config.update_from_flattened_dict(
        {"data.tiling": True, "data.resize": (96, 64), "eval.batch_size": 8}
    )
    records = grouped(10, GROUPS)
    trained = loop.train(Windows(config), records, 0, tmp_path)
    noted = np.asarray(trained.variables[base.FITTED_ON])
    assert noted.tolist() == [*range(8), *range(8), 8, 9, 8, 9]
    assert trained.variables["parts"] == 8
    frames = np.concatenate(
        [x[:n] for x, _, n in geometry.batches(records, geometry.View.of(config), 8)]
    )
    for shown, record in zip(np.asarray(trained.variables["shown"]), noted, strict=True):
        both = [frames[record][:64], frames[record][-64:]]
        assert min(np.abs(shown - x / 255.0).max() for x in both) < 1e-6


@pytest.mark.parametrize(("groups", "count"), [("a", 1), ("aa", 2), ("ab", 2)])
def test_one_part_cannot_be_held_against_others_and_two_can(tiny_config, tmp_path, groups, count):
    method, _ = bank(tiny_config, "image")
    records = grouped(count, list(groups))
    trained = loop.train(method, records, 0, tmp_path)
    found = scoring.Scorer(trained, method.config).left_out(records)
    if groups != "ab":
        assert found is None
        return
    assert np.isfinite(found.scores).all()
    assert found.smallest_rate == pytest.approx(1 / 3)


def test_images_that_the_bank_was_not_built_of_are_refused(tiny_config, tmp_path):
    method, _ = bank(tiny_config, "image")
    trained = loop.train(method, grouped(3, list("abc")), 0, tmp_path)
    scorer = scoring.Scorer(trained, method.config)
    with pytest.raises(ValueError, match="not fitted on the good images of this call"):
        scorer.left_out(grouped(4, list("abcd")))
    del trained.variables[base.FITTED_ON]
    with pytest.raises(ValueError, match=r"calibration\.way=split"):
        scorer.left_out(grouped(3, list("abc")))

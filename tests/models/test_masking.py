"""Both forms of masking: exact counts, whole units, one mask per example key, whole at test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import methods
from mmrjax.models import backbones, masking
from mmrjax.runtime import mesh as mesh_lib

# Section 6.1 of the paper at 224 px and ratio 0.4: side of a unit, hidden units, all units.
UNITS = [
    (1, 20071, 50176),
    (2, 5018, 12544),
    (4, 1255, 3136),
    (8, 314, 784),
    (16, 79, 196),
    (32, 20, 49),
    (56, 7, 16),
    (112, 2, 4),
]
KEPT = dict(zip(range(10), (196, 176, 156, 137, 117, 98, 78, 58, 39, 19), strict=True))


@pytest.mark.parametrize("tenths", KEPT)
def test_kept_tokens_are_those_of_the_official_code(tenths):
    assert masking.kept_tokens(196, tenths / 10) == KEPT[tenths]


@pytest.mark.parametrize(("unit", "hidden", "units"), UNITS)
def test_exactly_the_stated_number_of_whole_units_is_hidden(unit, hidden, units):
    images = jnp.ones((2, 224, 224, 3))
    noise = masking.random_noise(jax.random.split(jax.random.key(0), 2), units)
    got = np.asarray(masking.hide_units(images, noise, unit, 0.4))
    assert set(np.unique(got)) == {0, 1}
    n = 224 // unit
    cut = got.reshape(2, n, unit, n, unit, 3)
    whole = cut[:, :, :1, :, :1, :1]
    np.testing.assert_array_equal(cut, np.broadcast_to(whole, cut.shape))
    np.testing.assert_array_equal((whole == 0).sum(axis=(1, 2, 3, 4, 5)), [hidden, hidden])


def test_the_units_of_least_noise_stay_and_equal_draws_hide_no_fewer():
    images = jnp.ones((1, 4, 6, 3))
    noise = jnp.asarray([[0.9, 0.1, 0.5, 0.5, 0.5, 0.2]])
    got = masking.hide_units(images, noise, 2, 0.5)[0, ::2, ::2, 0]
    np.testing.assert_array_equal(got, [[0, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize(("unit", "grid"), [(1, (42, 63)), (7, (6, 9)), (21, (2, 3))])
def test_any_common_divisor_of_the_sides_is_a_unit(unit, grid):
    assert masking.unit_grid((42, 63), unit) == grid


def test_other_units_are_refused_with_those_that_work():
    with pytest.raises(ValueError, match=r"mask_unit=6 .* \(42, 63\); choose one of 1, 3, 7, 21"):
        masking.unit_grid((42, 63), 6)


# --- as MMR uses them: both networks replaced by stubs that note what they are shown


class Stub:
    """Stands for a network: keeps what its last call was given, always answers the same."""

    patch = 16

    def __init__(self, features):
        self.features = features

    def apply(self, variables, images, *rest):
        self.images, self.rest = images, rest
        return self.features

    def normalise(self, images):
        return backbones.build("resnet18").normalise(images)


def shown(tiny_config, batch, predict=False, **student):
    """(student's, teacher's) view of a batch in training, or with `predict` in evaluation."""
    config = tiny_config.copy_and_resolve_references()
    config.student.update(student)
    method = methods.create("mmr", config)
    features = {3: jnp.ones((len(batch["image"]), 2, 2, 4))}
    method.student, method.teacher = Stub(features), Stub(features)
    if predict:
        method.predict({}, {"teacher": {}}, batch["image"])
    else:
        method.loss("train", {}, {"teacher": {}}, batch, jax.random.key(1), {})
    return method.student, method.teacher


def batch_of(count):
    key = jax.random.key(0)
    images = jax.random.uniform(key, (count, 64, 64, 3))
    return {
        "image": images,
        "weight": jnp.ones(count),
        "keys": jax.random.split(jax.random.fold_in(key, 1), count),
    }


PIXEL = {"mask_form": "pixel", "mask_unit": 8}


def test_the_teacher_sees_the_whole_image_and_the_student_every_token(tiny_config):
    student, teacher = shown(tiny_config, batch_of(2), **PIXEL)
    assert student.rest == ()  # no noise: no token is dropped, no mask token used
    zero = np.asarray(student.images == 0).all(axis=-1)
    assert zero.sum() == 2 * 8 * 8 * (64 - masking.kept_tokens(64, 0.4))
    np.testing.assert_array_equal(student.images[~zero], teacher.images[~zero])
    assert (np.asarray(teacher.images) != 0).all()


def test_a_mask_depends_on_the_key_of_its_example_alone(tiny_config):
    batch = batch_of(4)
    order = np.array([2, 0, 3, 1])
    moved = {name: value[order] for name, value in batch.items()}
    plain, shuffled = (shown(tiny_config, b, **PIXEL)[0].images for b in (batch, moved))
    np.testing.assert_array_equal(plain[order], shuffled)
    zero = np.asarray(plain == 0).all(axis=-1)
    assert (zero[0] != zero[1]).any()


def test_dropping_is_the_default_and_draws_one_number_per_patch_from_the_key(tiny_config):
    batch = batch_of(2)
    for options in ({}, {"mask_form": "drop", "mask_unit": 7}):
        student, teacher = shown(tiny_config, batch, **options)
        noise, ratio = student.rest
        wanted = jax.vmap(lambda key: jax.random.uniform(key, (16,)))(batch["keys"])
        np.testing.assert_array_equal(noise, wanted)
        assert ratio == 0.4
        np.testing.assert_array_equal(student.images, teacher.images)


@pytest.mark.parametrize("options", [{}, PIXEL], ids=["drop", "pixel"])
def test_evaluation_is_unmasked(tiny_config, options):
    student, teacher = shown(tiny_config, batch_of(2), predict=True, **options)
    assert student.rest == ()
    np.testing.assert_array_equal(student.images, teacher.images)


def test_a_step_on_hidden_pixels_lowers_the_loss_and_leaves_the_mask_token(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.student.update(PIXEL, layers=(3,), depth=1)
    method, batch, key = methods.create("mmr", config), batch_of(2), jax.random.key(0)
    method.teacher = Stub({3: jax.random.normal(key, (2, 4, 4, 256))})
    variables = jax.jit(method.student.init)(key, batch["image"])

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return method.loss(
            "train", {**variables, "params": params}, {"teacher": {}}, batch, key, {}
        )[0]

    before, slopes = loss(variables["params"])
    stepped = jax.tree.map(lambda p, slope: p - 0.1 * slope, variables["params"], slopes)
    assert loss(stepped)[0] < before
    assert (slopes["mask_token"] == 0).all()


def test_one_and_eight_devices_hide_the_same_units():
    images, keys = jnp.ones((8, 32, 32, 3)), jax.random.split(jax.random.key(0), 8)

    @jax.jit
    def hide(images, keys):
        return masking.hide_units(images, masking.random_noise(keys, 64), 4, 0.4)

    one, eight = (hide(*mesh_lib.put_batch((images, keys), mesh_lib.make_mesh(n))) for n in (1, 8))
    np.testing.assert_array_equal(one, eight)


def test_a_unit_that_does_not_divide_the_image_is_refused_before_anything_is_loaded(tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.student.mask_unit = 5
    methods.create("mmr", config)  # not used by dropping
    config.student.mask_form = "pixel"
    with pytest.raises(ValueError, match=r"mask_unit=5 must divide the image sides \(64, 64\)"):
        methods.create("mmr", config)

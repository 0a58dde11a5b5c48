"""The masked autoencoder against the official code, and the counts of the published sizes."""

import json

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import mae, masking, patches
from mmrjax.weights import mae_names


@pytest.fixture(scope="module")
def golden(golden_dir):
    """(model, variables, normalised images, order of the patches, outputs, tolerances)."""
    folder = golden_dir / "mae"
    keys = json.loads((folder / "keys.json").read_text())
    state = {
        key.removeprefix("mae."): formula.formula_weights(key, shape) for key, shape in keys.items()
    }
    model = mae.MaskedAutoencoder((4, 4), 96, 3, 3, 64, 2, 4)
    x = 4 * (formula.formula_image("mae.x", (2, 3, 64, 64)) - 0.5)
    order, _ = masking.shuffle(jnp.asarray(formula.formula_noise("mae.noise", (2, 16))))
    errors = json.loads((folder / "errors.json").read_text())
    images = jnp.asarray(x.transpose(0, 2, 3, 1))
    outputs = dict(np.load(folder / "outputs.npz"))
    return model, mae_names.from_torch(state), images, order, outputs, errors


@pytest.fixture(scope="module")
def paint(golden):
    """(variables, images, order) -> pixels painted from four visible patches, compiled once."""
    return jax.jit(lambda variables, images, order: golden[0].apply(variables, images, order, 4))


def atol(errors: dict, name: str) -> float:
    return errors[name.removesuffix("__slice")]["atol"]


def test_encoder_and_decoder_are_those_of_the_official_code(golden, agree):
    model, variables, images, order, want, errors = golden
    encode = jax.jit(
        lambda kept: model.apply(variables, images, order, kept, method="encode")[1],
        static_argnums=0,
    )

    @jax.jit
    def pixels(latent):
        decoded = model.apply(variables, latent, order, method="decode")
        return model.apply(variables, decoded, method=lambda m, x: m.decoder.paint(x))

    latent, whole = encode(4), encode(16)
    agree("mae latent", latent, want["latent"], atol(errors, "latent"))
    agree("mae pixels", pixels(latent), want["pred"], atol(errors, "pred"))
    agree("mae latent, nothing hidden", whole, want["latent_ratio0"], atol(errors, "latent_ratio0"))


def test_loss_and_gradients_are_those_of_the_official_code(golden, agree):
    model, variables, images, order, want, errors = golden

    def loss(params):
        painted = model.apply({**variables, "params": params}, images, order, 4)
        return jnp.abs(painted - images).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(variables["params"])
    agree("mae l1", value, want["l1"], atol(errors, "l1"))
    state = mae_names.to_torch({**variables, "params": gradients})
    seen = [name for name in want if name.startswith("grad__") and not name.endswith("__digest")]
    assert len(seen) >= 5
    for name in seen:
        key, _, part = name.removeprefix("grad__").partition("__")
        got = formula.digest(state[key])[0] if part else state[key]
        agree(f"mae {name}", got, want[name], atol(errors, name))


def test_patches_are_cut_as_in_the_official_code(golden, paint, agree):
    _, variables, images, order, want, errors = golden
    agree("mae patchify", patches.patchify(images, 16)[:, :3], want["patchify_x"], 0)
    painted = paint(variables, images, order)
    corner = painted[:, 10:22, 10:22].transpose(0, 3, 1, 2)
    agree("mae image", corner, want["image_corner"], atol(errors, "image_corner"))


def test_the_first_block_is_tapped_before_the_second(golden):
    """With the other blocks switched off, the output of the first is what reaches the norm."""
    model, variables, images, *_ = golden
    off = jax.tree.map(jnp.asarray, variables)
    blocks = off["params"]["encoder"]["blocks"]
    for name in ("attn/proj", "fc2"):
        part = blocks["attn"]["proj"] if name == "attn/proj" else blocks["fc2"]
        for leaf in ("kernel", "bias"):
            part[leaf] = part[leaf].at[1:].set(0)
    encode = jax.jit(lambda variables: model.apply(variables, images, method="encode"))
    first, last = encode(off)
    mean, deviation = first.mean(-1, keepdims=True), first.std(-1, keepdims=True)
    norm = off["params"]["encoder"]["norm"]
    expected = (first - mean) / deviation * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(last, expected, atol=1e-4)
    again, _ = encode(variables)
    np.testing.assert_allclose(again, first, atol=1e-6)


def test_zeros_may_stand_for_hidden_patches(golden, paint):
    model, variables, images, order, *_ = golden
    zeros = jax.jit(model.clone(zeros=True).apply, static_argnums=3)(variables, images, order, 4)
    params = {**variables["params"], "mask_token": jnp.zeros((1, 1, 64))}
    expected = paint({**variables, "params": params}, images, order)
    np.testing.assert_allclose(zeros, expected, atol=1e-6)
    assert not np.allclose(zeros, paint(variables, images, order), atol=1e-3)


def test_the_order_of_the_visible_patches_does_not_matter(golden, paint):
    _, variables, images, order, *_ = golden
    swapped = jnp.concatenate([order[:, [2, 0, 3, 1]], order[:, 4:]], axis=1)
    pictures = [paint(variables, images, ids) for ids in (order, swapped)]
    np.testing.assert_allclose(*pictures, atol=2e-5)


def test_a_hidden_patch_has_no_influence(golden, paint):
    _, variables, images, order, *_ = golden
    row, column = divmod(int(order[0, 10]), 4)
    changed = images.at[0, row * 16 + 3, column * 16 + 5].add(1.0)
    pictures = [paint(variables, x, order) for x in (images, changed)]
    np.testing.assert_array_equal(*pictures)


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("sizes", "encoder", "decoder"),
    [((1024, 24, 16), 303_099_904, 26_139_392), ((192, 6, 3, 128, 2, 4), 2_817_408, 520_704)],
)
def test_parameters_are_as_many_as_published(sizes, encoder, decoder):
    model = mae.MaskedAutoencoder((14, 14), *sizes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    params = shapes["params"]
    own = count(params["decoder"]) + count(params["mask_token"])
    assert own == decoder
    assert count(params) - own == encoder
    if sizes[0] == 1024:
        assert count(shapes["positions"]["encoder_table"]) == 201_728
        assert count(shapes) == 329_541_888


def test_groups_of_visible_patches_are_disjoint_and_hide_each_patch_three_times():
    groups = mae.visible_groups(196, 4)
    hidden = np.zeros(196, int)
    for order, visible in groups:
        assert visible == 49
        np.testing.assert_array_equal(np.sort(order[0]), np.arange(196))
        hidden[order[0, visible:]] += 1
    assert (hidden == 3).all()
    np.testing.assert_array_equal(groups[0][0], mae.visible_groups(196, 4)[0][0])

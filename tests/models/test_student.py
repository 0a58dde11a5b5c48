"""The student against golden values of the official PyTorch code, and its properties."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import positions, student
from mmrjax.weights import source, torch_names

CHANNELS = {1: 16, 2: 32, 3: 64}
MODEL = student.MaskedStudent(width=48, depth=3, heads=3, channels=CHANNELS)


@pytest.fixture(scope="module")
def golden(golden_dir):
    folder = golden_dir / "student"
    return np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz"), folder


def variables(folder, variant):
    state = source.read_state(folder / f"state_img64{variant}.safetensors")
    loaded = torch_names.student_from_torch(state)
    table = loaded["positions"]["encoder_table"]
    # The official code resizes its 14x14 table in the forward pass; we do it once.
    loaded["positions"]["encoder_table"] = positions.resize_table(table, (4, 4))
    return loaded


@pytest.mark.parametrize(
    ("variant", "ratio"),
    [("", 0.4), ("", 0.0), ("", 0.75), ("_sincos", 0.4), ("_lowvar", 0.4), ("_lowvar", 0.0)],
)
def test_features_equal_the_official_code(golden, variant, ratio):
    inputs, outputs, folder = golden
    image = inputs["img64__x"].transpose(0, 2, 3, 1)
    noise = inputs["img64__noise"] if ratio else None
    got = MODEL.apply(variables(folder, variant), image, noise, ratio)
    case = f"img64{variant}_m{round(ratio * 100):02d}"
    for layer in CHANNELS:
        want = outputs[f"{case}__layer{layer}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(got[layer], want, atol=5e-5)
    if ratio:  # unmasked, the official code shuffles its tokens and we do not
        np.testing.assert_allclose(got["latent"], outputs[f"{case}__latent"], atol=5e-5)


@pytest.mark.parametrize(("width", "grid"), [(48, 14), (48, 4), (768, 14)])
def test_position_tables_equal_the_official_code(golden, width, grid):
    want = golden[1][f"sincos_D{width}_G{grid}"]
    np.testing.assert_allclose(positions.sincos_2d(width, (grid, grid)), want, atol=1e-6)


def test_masked_tokens_do_not_reach_the_encoder(golden):
    inputs, _, folder = golden
    image = jnp.asarray(inputs["img64__x"][:1].transpose(0, 2, 3, 1))
    noise = jnp.asarray(inputs["img64__noise"][:1])
    loaded = variables(folder, "")

    def latent_sum(image):
        return MODEL.apply(loaded, image, noise, 0.4)["latent"].sum()

    slope = np.abs(jax.grad(latent_sum)(image)).reshape(4, 16, 4, 16, 3).sum(axis=(1, 3, 4))
    kept = np.argsort(noise[0])[:9]
    seen = np.zeros(16, bool)
    seen[np.asarray(kept)] = True
    assert (slope.ravel()[seen] > 0).all()
    assert (slope.ravel()[~seen] == 0).all()


def test_unmasked_output_needs_no_randomness_and_equals_a_shuffled_pass(golden):
    inputs, _, folder = golden
    image = inputs["img64__x"].transpose(0, 2, 3, 1)
    plain = MODEL.apply(variables(folder, ""), image)
    shuffled = MODEL.apply(variables(folder, ""), image, inputs["img64__noise"], 0.0)
    for layer in CHANNELS:
        np.testing.assert_allclose(plain[layer], shuffled[layer], atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "trained", "pyramid"),
    [((256, 512, 1024), 101_729_728, 16_081_600), ((64, 128, 256), 89_338_048, 3_689_920)],
)
def test_full_size_parameter_counts(channels, trained, pyramid):
    model = student.MaskedStudent(768, 12, 12, dict(zip((1, 2, 3), channels, strict=True)))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(shapes["params"]) == trained
    assert count(shapes["params"]["fpn"]) == pyramid
    assert shapes["positions"]["encoder_table"].size == 151_296


def test_only_the_asked_layers_exist():
    model = student.MaskedStudent(24, 1, 3, {2: 8})
    loaded = model.init(jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
    got = model.apply(loaded, jnp.ones((1, 32, 48, 3)))
    assert set(got) == {2, "latent"}
    assert got[2].shape == (1, 4, 6, 8)


def test_image_size_must_be_whole_patches():
    model = student.MaskedStudent(24, 1, 3, {3: 8})
    with pytest.raises(ValueError, match="multiple of the patch 16"):
        model.init(jax.random.key(0), jnp.zeros((1, 40, 32, 3)))


def test_initial_values_follow_the_official_distributions(golden_dir):
    model = student.MaskedStudent(192, 1, 3, {1: 64, 2: 128, 3: 256})
    params = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    bounds = {
        "patch_kernel": (params["patch_kernel"], (6 / (768 + 192)) ** 0.5),
        "patch_bias": (params["patch_bias"], 768**-0.5),
        "qkv": (params["encoder"]["blocks"]["attn"]["qkv"]["kernel"], (6 / (192 + 576)) ** 0.5),
        "deconv": (params["fpn"]["layer1_up1"]["kernel"], (96 * 4) ** -0.5),
        "deconv bias": (params["fpn"]["layer1_up1"]["bias"], (96 * 4) ** -0.5),
        "conv3": (params["fpn"]["layer3_conv2"]["conv"]["kernel"], (256 * 9) ** -0.5),
    }
    for name, (value, bound) in bounds.items():
        largest = float(jnp.abs(value).max())
        assert 0.9 * bound < largest <= bound, name
    assert float(params["mask_token"].std()) == pytest.approx(0.02, rel=0.2)
    keys = json.loads((golden_dir / "student" / "keys.json").read_text())
    assert "decoder_FPN_mask_token" in keys  # the same tensor under its official name

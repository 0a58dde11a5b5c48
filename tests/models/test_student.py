"""The student against golden values of the official PyTorch code, and its properties."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import masking, positions, student
from mmrjax.weights import source, torch_names

CHANNELS = {1: 16, 2: 32, 3: 64}
MODEL = student.MaskedStudent(width=48, depth=3, heads=3, channels=CHANNELS)


@pytest.fixture(scope="module")
def golden(golden_dir):
    folder = golden_dir / "student"
    return np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz"), folder


def by_name(features) -> dict:
    """The student's output with keys of one type, as JAX wants them in a tree."""
    return {str(name): value for name, value in features.items()}


def variables(folder, variant):
    state = source.read(folder / f"state_img64{variant}.safetensors")[0]
    loaded = torch_names.student_from_torch(state)
    table = loaded["positions"]["encoder_table"]
    # The official code resizes its 14x14 table in the forward pass; we do it once.
    loaded["positions"]["encoder_table"] = positions.resize_table(table, (4, 4))
    return loaded


@functools.partial(jax.jit, static_argnums=3)
def forward(variables, image, noise, ratio):
    return by_name(MODEL.apply(variables, image, noise, ratio))


# --- golden values


@pytest.mark.parametrize(
    ("variant", "case"),
    [
        *[("", case) for case in ("m40", "m00", "m75", "m00_altshuffle")],
        *[(variant, case) for variant in ("_sincos", "_lowvar") for case in ("m40", "m00")],
    ],
)
def test_features_equal_the_official_code(golden, agree, variant, case):
    """m40: 40 % masked. lowvar: variances near 1e-6, where LayerNorm's epsilon decides."""
    inputs, outputs, folder = golden
    name = f"img64{variant}_{case}"
    noise = inputs["img64__noise"]
    if case == "m00_altshuffle":  # the noise whose order is the stored one
        noise = np.argsort(inputs["img64__ids_shuffle_alt"], axis=1).astype(np.float32)
    image = inputs["img64__x"].transpose(0, 2, 3, 1)
    got = forward(variables(folder, variant), image, noise, int(case[1:3]) / 100)
    want = {str(k): outputs[f"{name}__layer{k}"].transpose(0, 2, 3, 1) for k in CHANNELS}
    agree(f"student, {name}", got, {**want, "latent": outputs[f"{name}__latent"]}, 5e-5)
    restore = masking.shuffle(jnp.asarray(noise))[1]
    np.testing.assert_array_equal(restore, outputs[f"{name}__ids_restore"])
    kept = masking.kept_tokens(16, int(case[1:3]) / 100)
    np.testing.assert_array_equal(restore >= kept, outputs[f"{name}__mask"])


@pytest.mark.parametrize(("width", "grid"), [(48, 14), (48, 4), (768, 14)])
def test_position_tables_equal_the_official_code(golden, agree, width, grid):
    got = positions.sincos_2d(width, (grid, grid))
    agree(f"position table {width} x {grid}²", got, golden[1][f"sincos_D{width}_G{grid}"], 1e-7)


def test_position_table_has_the_values_and_the_order_of_mae():
    """Column first, row second; specs give these digits."""
    table = positions.sincos_2d(768, (14, 14))
    assert not table[0].any()  # the class token
    np.testing.assert_allclose(np.linalg.norm(table[1:], axis=1), 384**0.5, rtol=1e-6)
    code = [0.84147, 0.81525, 0.78859, 0.76172]  # of position 1
    np.testing.assert_allclose(table[1 + 1, :4], code, atol=5e-6)  # row 0, column 1
    np.testing.assert_array_equal(table[1 + 1, 384:388], 0)
    np.testing.assert_array_equal(table[1 + 14, :2], 0)  # row 1, column 0
    np.testing.assert_allclose(table[1 + 14, 384:388], code, atol=5e-6)


def test_kept_tokens_follow_the_official_table(golden):
    table = golden[1]
    ratios, tokens = table["len_keep__ratio"], table["len_keep__L"]
    got = [[masking.kept_tokens(int(n), float(r)) for r in ratios] for n in tokens]
    np.testing.assert_array_equal(got, table["len_keep__table"])


# --- properties


def test_masked_tokens_do_not_reach_the_encoder(golden):
    inputs, _, folder = golden
    image = jnp.asarray(inputs["img64__x"][:1].transpose(0, 2, 3, 1))
    noise = jnp.asarray(inputs["img64__noise"][:1])
    loaded = variables(folder, "")

    @jax.jit
    @jax.grad
    def slope_of(image):
        return MODEL.apply(loaded, image, noise, 0.4)["latent"].sum()

    slope = np.abs(slope_of(image)).reshape(4, 16, 4, 16, 3).sum(axis=(1, 3, 4))
    kept = np.argsort(noise[0])[:9]
    seen = np.zeros(16, bool)
    seen[np.asarray(kept)] = True
    assert (slope.ravel()[seen] > 0).all()
    assert (slope.ravel()[~seen] == 0).all()


def test_order_of_the_visible_tokens_does_not_matter(golden):
    """The same nine tokens in another order: another latent, the same features."""
    inputs, _, folder = golden
    image = inputs["img64__x"].transpose(0, 2, 3, 1)
    noise, loaded = inputs["img64__noise"], variables(folder, "")
    other = noise.copy()
    for row, kept in zip(other, np.argsort(noise, axis=1)[:, :9], strict=True):
        row[kept] = row[kept[::-1]]
    a, b = (forward(loaded, image, n, 0.4) for n in (noise, other))
    assert np.abs(a["latent"] - b["latent"]).max() > 0.1
    for layer in map(str, CHANNELS):
        np.testing.assert_allclose(a[layer], b[layer], atol=1e-5)


def test_unmasked_output_needs_no_randomness_and_equals_a_shuffled_pass(golden):
    inputs, _, folder = golden
    image = inputs["img64__x"].transpose(0, 2, 3, 1)
    plain = forward(variables(folder, ""), image, None, 0.0)
    shuffled = forward(variables(folder, ""), image, inputs["img64__noise"], 0.0)
    for layer in map(str, CHANNELS):
        np.testing.assert_allclose(plain[layer], shuffled[layer], atol=1e-5)


def shapes_of(model, size_hw, *arguments):
    """Shapes of (features, variables) on one image."""

    def init(key):
        features, loaded = model.init_with_output(key, jnp.zeros((1, *size_hw, 3)), *arguments)
        return by_name(features), loaded

    return jax.eval_shape(init, jax.random.key(0))


def base(channels):
    return student.MaskedStudent(768, 12, 12, dict(zip((1, 2, 3), channels, strict=True)))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("channels", "trained", "stages"),
    [
        ((256, 512, 1024), 101_729_728, [2_115_904, 3_737_984, 10_227_712]),
        ((64, 128, 256), 89_338_048, [1_525_312, 1_377_152, 787_456]),
    ],
)
def test_full_size_parameter_counts(channels, trained, stages):
    shapes = shapes_of(base(channels), (224, 224))[1]
    params = shapes["params"]
    pyramid = params["fpn"]
    assert count(params) == trained
    assert [
        sum(count(part) for name, part in pyramid.items() if name.startswith(f"layer{layer}_"))
        for layer in (1, 2, 3)
    ] == stages
    assert count(params["encoder"]["blocks"]) == 12 * 7_087_872
    assert params["mask_token"].size == 768
    assert trained - sum(stages) - 768 == 85_647_360  # the encoder
    assert shapes["positions"]["encoder_table"].size == 151_296


def test_encoder_sees_118_tokens_in_training_and_197_at_test():
    noise = jnp.zeros((1, 196))
    for arguments, tokens in (((noise, 0.4), 118), ((), 197)):
        features, _ = shapes_of(base((8, 8, 8)), (224, 224), *arguments)
        assert features["latent"].shape == (1, tokens, 768)


def test_only_the_asked_layers_exist():
    model = student.MaskedStudent(24, 1, 3, {2: 8})
    got, _ = shapes_of(model, (32, 48))
    assert set(got) == {"2", "latent"}
    assert got["2"].shape == (1, 4, 6, 8)


def test_image_size_must_be_whole_patches():
    model = student.MaskedStudent(24, 1, 3, {3: 8})
    with pytest.raises(ValueError, match="multiple of the patch 16"):
        model.init(jax.random.key(0), jnp.zeros((1, 40, 32, 3)))


def test_initial_values_follow_the_official_distributions(golden_dir):
    model = student.MaskedStudent(192, 1, 3, {1: 64, 2: 128, 3: 256})
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
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

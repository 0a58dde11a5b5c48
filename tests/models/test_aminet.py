"""AMI-Net's two networks: stored values of an independent PyTorch transcription, size, tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import aminet, positions
from mmrjax.models.patches import patchify, unpatchify
from mmrjax.weights import source

SMALL = aminet.AMINet(
    grid=(4, 4), patch_entries=128, width=24, heads=3, depth=2, cluster_depth=2, clusters=3
)


@pytest.fixture(scope="module")
def golden(golden_dir):
    """(inputs, outputs, parameters) of an independent PyTorch transcription."""
    folder = golden_dir / "aminet"
    state = source.read(folder / "state.safetensors")[0]
    return np.load(folder / "inputs.npz"), np.load(folder / "outputs.npz"), from_official(state)


def from_official(state: dict) -> dict:
    """Official names and layouts to ours; of weights, and of gradients alike."""

    def linear(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def convolution(name):  # (out, in, row, column) to (row, column, in) x out
        kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
        return {"kernel": kernel.reshape(-1, kernel.shape[-1]), "bias": state[f"{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def encoder(blocks, last):
        each = [
            {
                "norm1": norm(f"{blocks}.{i}.norm1"),
                "attn": {k: linear(f"{blocks}.{i}.attn.{k}") for k in ("qkv", "proj")},
                "norm2": norm(f"{blocks}.{i}.norm2"),
                "fc1": linear(f"{blocks}.{i}.mlp.fc1"),
                "fc2": linear(f"{blocks}.{i}.mlp.fc2"),
            }
            for i in range(2)
        ]
        return {"blocks": jax.tree.map(lambda *x: np.stack(x), *each), "norm": norm(last)}

    return {
        "embed": convolution("patch_embed.proj"),
        "cluster_embed": convolution("auxi_embed.proj"),
        "inpainter": encoder("blocks", "norm"),
        "aggregator": encoder("auxiliary", "norm_auxi"),
        "head": linear("inpainting_pred"),
        "cluster_tokens": state["cls_token"][0],
        "mask_token": state["mask_token"][0, 0],
    }


def golden_patches(inputs) -> jax.Array:
    return patchify(jnp.asarray(inputs["features"].transpose(0, 2, 3, 1)), 4)


# --- golden values


def test_training_pass_equals_an_independent_transcription(golden, agree):
    inputs, want, params = golden
    noise = jnp.asarray(inputs["noise_cluster"]), jnp.asarray(inputs["noise_inpaint"])
    visible = jnp.asarray(want["train__visible"])
    apply = jax.jit(SMALL.apply)
    _, centres, predicted = apply({"params": params}, golden_patches(inputs), visible, noise)
    agree("AMI-Net, prediction in training", predicted, want["train__prediction"], 5e-5)
    agree("AMI-Net, cluster centres in training", centres, want["train__centres"], 5e-5)


def test_position_code_is_that_of_an_independent_transcription(golden_dir):
    state = source.read(golden_dir / "aminet" / "state.safetensors")[0]
    table = positions.sincos_2d(24, (4, 4))[1:]  # without the row of a class token
    np.testing.assert_array_equal(table, state["pos_embed"][0])


# --- size


@functools.cache
def full_size(train_mask_token=True) -> dict:
    """{part: number of parameters} of the paper's model."""
    model = aminet.AMINet((16, 16), 28672, 768, 12, 8, train_mask_token=train_mask_token)
    patches = jax.ShapeDtypeStruct((1, 256, 28672), jnp.float32)
    visible = jax.ShapeDtypeStruct((1, 256), bool)
    params = jax.eval_shape(model.init, jax.random.key(0), patches, visible)["params"]
    return {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in params.items()}


def test_full_size_has_the_parameters_of_the_official_model():
    parts = full_size()
    assert parts["embed"] == parts["cluster_embed"] == 22_020_864
    assert parts["head"] == 22_048_768
    blocks = parts["inpainter"] + parts["aggregator"] - 2 * 2 * 768  # without the last norms
    assert blocks == 63_790_848
    assert parts["cluster_tokens"] == 6_144
    assert parts["mask_token"] == 768
    assert sum(parts.values()) == 129_891_328
    assert sum(full_size(train_mask_token=False).values()) == 129_890_560


@pytest.mark.slow
def test_initial_values_follow_the_official_distributions():
    model = aminet.AMINet((2, 2), 1024, 64, 2, 1, clusters=64)
    patches, visible = jnp.zeros((1, 4, 1024)), jnp.ones((1, 4), bool)
    params = jax.jit(model.init)(jax.random.key(0), patches, visible)["params"]

    def spread(name, leaf="kernel"):
        """(largest value, standard deviation) in units of a uniform distribution on [-1, 1]."""
        x = np.abs(params[name][leaf])
        return x.max(), (3 * np.mean(x**2)) ** 0.5

    xavier, torchs = (6 / (1024 + 64)) ** 0.5, 1024**-0.5
    assert spread("embed") == pytest.approx((xavier, xavier), rel=0.02)
    assert spread("head") == pytest.approx((xavier, xavier), rel=0.02)
    assert spread("cluster_embed") == pytest.approx((torchs, torchs), rel=0.02)
    for name in ("embed", "cluster_embed"):  # 64 draws only
        assert spread(name, "bias") == pytest.approx((torchs, torchs), rel=0.2)
    assert np.std(params["cluster_tokens"]) == pytest.approx(0.02, rel=0.05)
    for zero in (params["mask_token"], params["head"]["bias"]):
        np.testing.assert_array_equal(zero, 0)


# --- tokens


@pytest.mark.slow
def test_hidden_patches_reach_no_prediction_and_visible_ones_do(golden):
    inputs, want, params = golden
    visible = jnp.asarray(want["train__visible"])

    @jax.jit
    @jax.grad
    def slope_of(patches):
        return SMALL.apply({"params": params}, patches, visible, method="inpaint").sum()

    slope = np.abs(slope_of(golden_patches(inputs))).sum(axis=-1)
    assert (slope[want["train__visible"]] > 0).all()
    assert (slope[~want["train__visible"]] == 0).all()


def test_mask_token_comes_before_the_position():
    """All hidden: predictions differ by position alone, and not at all without a table."""
    model = aminet.AMINet((2, 2), 8, 8, 2, 1)
    patches, hidden = jnp.ones((1, 4, 8)), jnp.zeros((1, 4), bool)
    variables = jax.jit(model.init)(jax.random.key(0), patches, hidden)
    inpaint = jax.jit(functools.partial(model.apply, method="inpaint"))
    out = np.asarray(inpaint(variables, patches, hidden))[0]
    assert np.abs(out - out[:1]).max(axis=1)[1:].min() > 1e-3
    other = inpaint(variables, 5 * patches, hidden)[0]
    np.testing.assert_array_equal(out, other)


def test_jitter_is_noise_times_length_over_width_times_scale():
    tokens = jnp.asarray([[[3.0, 4, 0, 0], [0, 0, 0, 0]]])
    noise = jnp.asarray([[[1.0, -1, 2, 0], [5, 5, 5, 5]]])
    got = aminet.jitter(tokens, noise, 20.0)
    np.testing.assert_allclose(got[0, 0], [3 + 25, 4 - 25, 50, 0])  # 5 / 4 * 20 = 25
    np.testing.assert_array_equal(got[0, 1], 0)  # a mask token of length 0 gets none


def test_gradient_of_the_jitter_includes_the_length_and_is_finite_at_a_zero_token():
    noise = jnp.asarray([[[1.0, 0], [1, 1]]])
    slope = jax.grad(lambda tokens: aminet.jitter(tokens, noise, 2.0).sum())
    got = slope(jnp.asarray([[[3.0, 4], [0, 0]]]))
    np.testing.assert_allclose(got[0], [[1 + 0.6, 1 + 0.8], [1, 1]], rtol=1e-6)


def test_jitter_of_scale_0_is_none(golden):
    inputs, want, params = golden
    visible = jnp.asarray(want["train__visible"])
    patches, noise = golden_patches(inputs), jnp.asarray(inputs["noise_cluster"])
    still = SMALL.clone(jitter=0.0)
    inpaint = jax.jit(functools.partial(still.apply, method="inpaint"))
    with_noise = inpaint({"params": params}, patches, visible, noise)
    without = inpaint({"params": params}, patches, visible)
    np.testing.assert_allclose(with_noise, without, atol=1e-5)


@pytest.mark.slow
def test_norms_have_torchs_epsilon():
    """Blocks switched off, tokens of variance 1e-5: the last norms give 1 / sqrt(2), not 0.95."""
    model = aminet.AMINet((1, 1), 8, 8, 2, 1, clusters=2)
    patches, hidden = jnp.zeros((1, 1, 8)), jnp.zeros((1, 1), bool)
    params = jax.jit(model.init)(jax.random.key(0), patches, hidden)["params"]
    for part in ("inpainter", "aggregator"):
        blocks = params[part]["blocks"]
        for last in (blocks["attn"]["proj"], blocks["fc2"]):
            last["kernel"] = jnp.zeros_like(last["kernel"])
    small = jnp.asarray([1e-5**0.5, -(1e-5**0.5)] * 4)
    params["cluster_tokens"] = jnp.stack([small, -small])
    params["mask_token"] = small - positions.sincos_2d(8, (1, 1))[1]
    params["head"]["kernel"] = jnp.eye(8)
    _, centres, predicted = jax.jit(model.apply)({"params": params}, patches, hidden)
    want = np.array([1, -1] * 4) / 2**0.5
    np.testing.assert_allclose(centres[0], [want, -want], rtol=1e-2)
    np.testing.assert_allclose(predicted[0, 0], want, rtol=1e-2)


def test_patches_have_pixels_row_by_row_and_come_back_exactly():
    maps = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3).astype(np.float32)
    cut = np.asarray(patchify(jnp.asarray(maps), 4))
    assert cut.shape == (2, 6, 48)
    for p, q, c in ((0, 0, 0), (2, 1, 2), (3, 3, 1)):
        assert cut[1, 4, (p * 4 + q) * 3 + c] == maps[1, 4 + p, 4 + q, c]  # row 1, column 1
    np.testing.assert_array_equal(unpatchify(jnp.asarray(cut), (2, 3), 4), maps)

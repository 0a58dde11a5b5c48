"""EfficientNet-lite: the weights in the box against a plain PyTorch forward, shapes, depthwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import weights
from mmrjax.models import backbones, efficientnet

NAMES = sorted(efficientnet.ARCHITECTURES)


def picture(height: int, width: int) -> np.ndarray:
    """The picture of the golden values, float32 [1, h, w, 3] in [0, 1]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    channels = (
        0.5 + 0.5 * np.sin(x / 7 + y / 11),
        0.5 + 0.5 * np.cos(x / 5 - y / 13),
        x * y % 17 / 16,
    )
    return np.stack(channels, axis=-1)[None].astype(np.float32)


def test_features_of_the_weights_in_the_box_equal_plain_pytorch(golden_dir):
    """Sides of 65 and 90 px: the padding is asymmetric in one direction or another."""
    _, variables, facts = weights.load_teacher("efficientnet_lite0", "embedded")
    backbone = backbones.build("efficientnet_lite0", taps=(2, 3, 5, 7))
    images = backbone.normalise(jnp.asarray(picture(65, 90)))
    got = jax.jit(backbone.apply)(variables, images)
    want = np.load(golden_dir / "efficientnet" / "lite0.npz")
    for layer, stage in enumerate((2, 3, 5, 7), start=1):
        expected = want[f"stage{stage}"]
        np.testing.assert_allclose(
            got[layer][0, ..., :8], expected, atol=2e-5 * np.abs(expected).max()
        )
    assert (facts["licence"], facts["random"]) == ("Apache-2.0", False)


@pytest.mark.parametrize("name", NAMES)
def test_channels_and_strides_are_those_of_the_maps(name):
    backbone = backbones.build(name, taps=(1, 2, 3, 4, 5, 6, 7))
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(backbone.module.init, jax.random.key(0), image)
    maps = jax.eval_shape(backbone.apply, variables, image)
    for layer, x in maps.items():
        stride = backbone.strides[layer]
        assert x.shape == (1, 64 // stride, 96 // stride, backbone.channels[layer])


def test_nothing_after_the_last_tap_is_computed():
    backbone = backbones.build("efficientnet_lite0", (1,))
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    params = jax.eval_shape(backbone.module.init, jax.random.key(0), image)["params"]
    assert {name.split("_")[0] for name in params} == {"stem", "stage1", "stage2"}


def test_a_stage_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="after stages 1 to 7, not 8"):
        backbones.build("efficientnet_lite0", taps=(2, 8))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sides", [(7, 8), (1, 2), (12, 5)])
def test_shifted_images_sum_to_the_depthwise_convolution(size, stride, sides):
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, *sides, 6)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 1, 6)), jnp.float32)
    want = jax.lax.conv_general_dilated(
        image,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    got = efficientnet._shifted(image, kernel, (stride, stride))
    np.testing.assert_allclose(got, want, atol=1e-5)

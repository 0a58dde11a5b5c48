"""3x3 convolutions by tiles against XLA's, and where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmrjax.models import backbones, fpn, resnet, student, winograd


def random(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_the_matrices_convolve_any_six_numbers_with_any_three():
    rng = np.random.default_rng(0)
    for _ in range(5):
        d, g = rng.normal(size=6), rng.normal(size=3)
        found = winograd.AT @ ((winograd.G @ g) * (winograd.BT @ d))
        np.testing.assert_allclose(found, [d[i : i + 3] @ g for i in range(4)], atol=1e-12)


@pytest.mark.parametrize("features", [4, 5])
@pytest.mark.parametrize(
    "shape",
    [(3, 6, 9, 4), (16, 4, 5, 4), (1, 1, 1, 4), (2, 5, 1, 4), (24, 24, 24, 4), (32, 8, 12, 4)],
)
def test_values_and_gradients_are_those_of_the_convolution(shape, features):
    """Of sizes that fill no tile, of batches that devices do not divide, and over several rounds.

    With as many features as channels an image's result takes its own place.
    """
    x, kernel = jnp.asarray(random(shape)), jnp.asarray(random((3, 3, shape[-1], features), 1))
    gradient = jnp.asarray(random((*shape[:3], features), 2))
    results = {}
    for convolve in (winograd.by_tiles, winograd.direct):
        y, pull = jax.vjp(convolve, x, kernel)
        results[convolve] = (y, *pull(gradient))
    for ours, xla in zip(*results.values(), strict=True):
        np.testing.assert_allclose(ours, xla, rtol=1e-4, atol=1e-5 * float(xla.std()) + 5e-5)


def test_the_error_is_about_what_the_docstring_says():
    x, kernel = random((2, 28, 28, 128)), random((3, 3, 128, 128), 1)
    with jax.enable_x64(True):
        exact = np.asarray(winograd.direct(x.astype(np.float64), kernel.astype(np.float64)))
    errors = [
        np.abs(np.asarray(convolve(x, kernel)) - exact).max() / exact.std()
        for convolve in (jax.jit(winograd.by_tiles), jax.jit(winograd.direct))
    ]
    assert errors[0] < 2e-5
    assert errors[1] < 5e-6


def test_devices_convolve_their_own_images_and_exchange_the_kernel_gradient_alone():
    devices = jax.device_count()
    assert devices > 1, "conftest shows JAX several devices"
    mesh = Mesh(np.array(jax.devices()), ("data",))
    over = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(random((2 * devices, 8, 8, 32)), over)
    gradient = jax.device_put(random((2 * devices, 8, 8, 32), 1), over)
    kernel = jax.device_put(random((3, 3, 32, 32), 2), NamedSharding(mesh, PartitionSpec()))
    both = jax.jit(lambda x, k, g: jax.vjp(winograd.by_tiles, x, k)[1](g))
    text = both.lower(x, kernel, gradient).compile().as_text()
    assert text.count(" all-reduce(") == 1
    for word in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {word}(" not in text
    expected = jax.vjp(winograd.direct, x, kernel)[1](gradient)
    for ours, xla in zip(both(x, kernel, gradient), expected, strict=True):
        np.testing.assert_allclose(ours, xla, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("platform", "channels", "side", "dtype", "tiles"),
    [
        ("cpu", 32, 10, jnp.float32, True),
        ("cpu", 16, 10, jnp.float32, False),
        ("cpu", 32, 9, jnp.float32, False),
        ("cpu", 32, 10, jnp.bfloat16, False),
        ("cuda", 32, 10, jnp.float32, False),
        ("tpu", 32, 10, jnp.float32, False),
    ],
)  # fmt: skip
def test_tiles_are_for_cpus_large_wide_layers_and_float32(platform, channels, side, dtype, tiles):
    x, kernel = (
        jnp.ones((1, side, side, channels), dtype),
        jnp.ones((3, 3, channels, channels), dtype),
    )
    lowered = jax.jit(winograd.convolve).trace(x, kernel).lower(lowering_platforms=(platform,))
    assert ("stablehlo.convolution" not in lowered.as_text()) == tiles


def test_convolutions_of_stride_1_in_teacher_and_pyramid_are_by_tiles():
    images = jnp.zeros((1, 224, 224, 3))
    teacher = resnet.ResNet(backbones.architecture("resnet18"))
    variables = jax.eval_shape(teacher.init, jax.random.key(0), images)
    assert loops(teacher, variables, images) == 10  # 13 3x3 but for two of stride 2; and the stem
    pyramid = fpn.SimpleFPN({1: 64, 2: 128, 3: 256})
    x = jnp.zeros((1, 14, 14, 192))
    variables = jax.eval_shape(pyramid.init, jax.random.key(0), x)
    assert loops(pyramid, variables, x) == 3


def loops(module, variables, x):
    text = jax.jit(module.apply).lower(variables, x).as_text()
    return text.count("stablehlo.while")


def test_modules_that_convolve_directly_have_no_loop_over_images():
    images = jnp.zeros((1, 80, 80, 3))
    teacher = resnet.ResNet(backbones.architecture("resnet18"), (1,), conv="direct")
    variables = jax.eval_shape(teacher.init, jax.random.key(0), images)
    assert loops(teacher, variables, images) == 0
    network = student.MaskedStudent(48, 1, 3, {1: 64, 2: 64})
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    found = {}
    for conv in ("auto", "direct"):
        run = network.clone(conv=conv).apply
        text = jax.jit(lambda v, x, run=run: list(run(v, x).values())).lower(variables, images)
        found[conv] = text.as_text().count("stablehlo.while")
    assert found["auto"] == found["direct"] + 2


def test_an_unknown_convolution_names_the_known():
    with pytest.raises(ValueError, match="unknown conv='fft'; available: auto, direct"):
        winograd.by_name("fft")

"""The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527) as MMR uses it.

Three parallel stages turn one stride-16 map into maps of stride 4, 8 and 16 with the channel
widths of the teacher. No activation after the norms: outputs may be negative.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import vit

# Kaiming-uniform with a = sqrt(5), torch's default for convolutions: U(-b, b), b = 1/sqrt(fan_in).
image_by_image = True  # False to count operations: XLA counts what a loop holds once

torch_conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Upsample2x(nn.Module):
    """A 2x2 transposed convolution of stride 2 with bias, as one dense map and a reshuffle.

    Kernel and stride are equal, so outputs do not overlap and the layer is a matrix product; the
    gradient of a library transposed convolution is far slower. Kernel layout [in, 2, 2, out].
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, 2h, 2w, features]."""
        b, h, w, c = x.shape
        # torch counts the fan-in of a transposed convolution as OUT * kh * kw.
        bound = (self.features * 4) ** -0.5
        kernel = self.param("kernel", uniform(bound), (c, 2, 2, self.features))
        bias = self.param("bias", uniform(bound), (self.features,))
        y = x.astype(self.dtype) @ kernel.reshape(c, -1).astype(self.dtype)
        y = y.reshape(b, h, w, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias.astype(self.dtype)


def uniform(bound: float) -> nn.initializers.Initializer:
    """Draws from U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _pointwise(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """A 1x1 convolution as a matrix product, whose gradient XLA:CPU computes three times faster."""
    return x @ kernel[0, 0]


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def convolve_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution of stride 1 whose kernel gradient stays in a CPU's cache.

    XLA:CPU computes that gradient as a convolution with a window of the size of the image, at a
    quarter of the rate of a matrix product. Here it is nine products per image: with the padded
    rows laid end to end, a shifted image is a slice.

    Args:
      x: [b, h, w, c].
      kernel: [3, 3, c, features].

    Returns:
      [b, h, w, features], zero-padded.
    """
    return _convolve(x, kernel)


def _convolve_forward(x: jax.Array, kernel: jax.Array):
    return _convolve(x, kernel), (x, kernel)


def _convolve_backward(saved, gradient: jax.Array):
    x, kernel = saved
    b, h, w, c = x.shape
    _, of_input = jax.vjp(lambda x: _convolve(x, kernel), x)
    # Every device goes through its own images, one after the other. All devices are counted, as in
    # training; on a part of them the result is the same, but images would be exchanged.
    devices = math.gcd(b, jax.device_count())
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    padded = padded.reshape(devices, b // devices, -1, c).swapaxes(0, 1)
    spread = jnp.pad(gradient, ((0, 0), (0, 0), (0, 2), (0, 0)))
    spread = spread.reshape(devices, b // devices, h * (w + 2), -1).swapaxes(0, 1)
    n = h * (w + 2) - 2  # the last two are padding, beyond which the last shift would reach
    shifts = (jnp.arange(3)[:, None] * (w + 2) + jnp.arange(3)).reshape(-1)

    def add(total, images):
        pixels, turned = images[0], images[1][:, :n].swapaxes(1, 2)
        products = jax.lax.map(
            lambda shift: jnp.matmul(
                turned,
                jax.lax.dynamic_slice_in_dim(pixels, shift, n, axis=1),
                preferred_element_type=jnp.float32,
            ),
            shifts,
        )
        return total + products, None

    zero = jnp.zeros((9, devices, gradient.shape[-1], c), jnp.float32)
    total = jax.lax.scan(add, zero, (padded, spread))[0].sum(1)
    return *of_input(gradient), total.transpose(0, 2, 1).reshape(kernel.shape).astype(kernel.dtype)


convolve_3x3.defvjp(_convolve_forward, _convolve_backward)


def _by_size(size: int):
    """What computes a convolution of nn.Conv, (x, kernel, ...) -> y; None: XLA."""
    if size == 1:
        return _pointwise
    if size == 3 and jax.default_backend() == "cpu" and image_by_image:
        return _convolve_large
    return None


def _convolve_large(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """Few pixels of many channels are as fast in XLA, and on several threads faster."""
    h, w, c = x.shape[1:]
    return (convolve_3x3 if h * w > c else _convolve)(x, kernel)


class ConvNorm(nn.Module):
    """A convolution without bias, followed by LayerNorm over the channels of each pixel."""

    features: int
    size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, h, w, features]."""
        x = nn.Conv(
            self.features,
            (self.size, self.size),
            padding=self.size // 2,
            use_bias=False,
            kernel_init=torch_conv_init,
            dtype=self.dtype,
            conv_general_dilated=_by_size(self.size),
            name="conv",
        )(x)
        return vit.layer_norm(self.dtype, "norm")(x)


class SimpleFPN(nn.Module):
    """Stride-16 features [b, h, w, d] to {layer: [b, h 2^(3-layer), w 2^(3-layer), channels]}.

    Attributes:
      channels: {layer in 1..3: output channels}; only these stages exist.
      dtype: compute dtype.
    """

    channels: dict[int, int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[int, jax.Array]:
        """Runs the stages of `channels`."""
        d = x.shape[-1]
        outputs = {}
        for layer, channels in sorted(self.channels.items()):
            y = x
            if layer == 1:
                y = Upsample2x(d // 2, self.dtype, name="layer1_up1")(y)
                y = vit.gelu(vit.layer_norm(self.dtype, "layer1_norm")(y))
                y = Upsample2x(d // 4, self.dtype, name="layer1_up2")(y)
            elif layer == 2:
                y = Upsample2x(d // 2, self.dtype, name="layer2_up1")(y)
            y = ConvNorm(channels, 1, self.dtype, name=f"layer{layer}_conv1")(y)
            outputs[layer] = ConvNorm(channels, 3, self.dtype, name=f"layer{layer}_conv2")(y)
        return outputs

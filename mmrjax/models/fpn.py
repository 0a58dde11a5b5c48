"""The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527) as MMR uses it.

Three parallel stages turn one stride-16 map into maps of stride 4, 8 and 16 with the channel
widths of the teacher. No activation follows the last norms: outputs may be negative.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import norm, winograd

# Kaiming-uniform with a = sqrt(5), torch's default for convolutions: U(-b, b), b = 1/sqrt(fan_in).
torch_conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Upsample2x(nn.Module):
    """A 2x2 transposed convolution of stride 2 with bias, as one matrix product and a reshuffle.

    Kernel and stride are equal, so outputs do not overlap and the layer is a matrix product. The
    gradient of JAX's transposed convolution is far slower. Kernel layout [in, 2, 2, out].
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
        y = y.reshape(b, h, w, 2, 2, self.features)
        y = y.transpose(0, 1, 3, 2, 4, 5)  # [b, h, 2, w, 2, features]
        return y.reshape(b, 2 * h, 2 * w, self.features) + bias.astype(self.dtype)


def uniform(bound: float) -> nn.initializers.Initializer:
    """Draws from U(-bound, bound)."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


def _pointwise(x: jax.Array, kernel: jax.Array, *_, **__) -> jax.Array:
    """A 1x1 convolution as a matrix product, whose gradient XLA:CPU computes three times faster."""
    return x @ kernel[0, 0]


class ConvNorm(nn.Module):
    """A 1x1 or 3x3 convolution without bias, then LayerNorm over the channels of each pixel.

    Attributes:
      features: output channels.
      size: side of the kernel, 1 or 3.
      dtype: compute dtype.
      convolve: computes the convolution, in the place of `jax.lax.conv_general_dilated`.
    """

    features: int
    size: int
    dtype: jnp.dtype
    convolve: Callable[..., jax.Array]

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
            conv_general_dilated=self.convolve,
            name="conv",
        )(x)
        return norm.layer_norm(self.dtype, "norm")(x)


class SimpleFPN(nn.Module):
    """The stages of the pyramid.

    Attributes:
      channels: {layer in 1..3: output channels}; only these stages exist.
      dtype: compute dtype.
      conv: how 3x3 convolutions are computed, see `winograd.by_name`.
    """

    channels: dict[int, int]
    dtype: jnp.dtype = jnp.float32
    conv: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[int, jax.Array]:
        """[b, h, w, d] of stride 16 -> {layer: [b, s h, s w, c]}, scale s = 2^(3 - layer)."""
        convolve = winograd.by_name(self.conv)
        d = x.shape[-1]
        outputs = {}
        for layer, channels in sorted(self.channels.items()):
            y = x
            if layer == 1:
                y = Upsample2x(d // 2, self.dtype, name="layer1_up1")(y)  # [b, 2 h, 2 w, d / 2]
                y = norm.gelu(norm.layer_norm(self.dtype, "layer1_norm")(y))
                y = Upsample2x(d // 4, self.dtype, name="layer1_up2")(y)  # [b, 4 h, 4 w, d / 4]
            elif layer == 2:
                y = Upsample2x(d // 2, self.dtype, name="layer2_up1")(y)  # [b, 2 h, 2 w, d / 2]
            # [b, s h, s w, c] from here on
            y = ConvNorm(channels, 1, self.dtype, _pointwise, name=f"layer{layer}_conv1")(y)
            y = ConvNorm(channels, 3, self.dtype, convolve, name=f"layer{layer}_conv2")(y)
            outputs[layer] = y
        return outputs

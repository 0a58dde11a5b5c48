"""EfficientNet-lite backbones, tapped after their stages, BatchNorm folded into the convolutions.

Source: Tan and Le 2019 (arXiv 1905.11946), in the "lite" form of TensorFlow's authors: no
squeeze-and-excitation, ReLU6, a stem of fixed width, padding "SAME" (asymmetric at stride 2). The
classifier and the convolution before it do not exist here.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

STAGES = 7
KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)
STEM = 32


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One member of the family: blocks and output channels of its seven stages."""

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    taps: ClassVar = (2, 3, 5)  # strides of 4, 8 and 16 px
    mean: ClassVar = (0.5, 0.5, 0.5)
    std: ClassVar = (0.5, 0.5, 0.5)
    multiple: ClassVar = 1

    def tap(self, number: int) -> tuple[int, int]:
        """(channels, stride in px) after a stage; ValueError beyond stages 1 to 7."""
        if not 1 <= number <= STAGES:
            raise ValueError(
                f"teacher.taps: an EfficientNet is tapped after stages 1 to {STAGES}, not {number}"
            )
        stride = 2
        for factor in STRIDES[:number]:
            stride *= factor
        return self.widths[number - 1], stride

    def module(self, taps: tuple[int, ...], dtype: jnp.dtype, conv: str) -> "EfficientNet":
        """The network through the last of `taps`."""
        return EfficientNet(self, taps, dtype, conv)


ARCHITECTURES = {
    "efficientnet_lite0": Architecture((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite1": Architecture((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "efficientnet_lite2": Architecture((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}


def depthwise(image: jax.Array, kernel: jax.Array, strides, padding, **kwargs) -> jax.Array:
    """A depthwise convolution with padding "SAME"; on CPU as a sum of shifted images.

    XLA's depthwise convolution is so slow on CPU that the whole of lite0 took five times as long.

    Args:
      image: [b, h, w, c].
      kernel: [kh, kw, 1, c].
      strides: (rows, columns), px.
      padding: "SAME".
      **kwargs: what flax hands to `jax.lax.conv_general_dilated`.

    Returns:
      [b, ceil(h / rows), ceil(w / columns), c].
    """

    def direct(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, strides, padding, **kwargs)

    def shifted(image, kernel):
        return _shifted(image, kernel, strides)

    return jax.lax.platform_dependent(image, kernel, cpu=shifted, default=direct)


def _shifted(image: jax.Array, kernel: jax.Array, strides) -> jax.Array:
    """`depthwise` as a sum of shifted images, which XLA fuses into one loop."""
    size, sides = kernel.shape[:2], image.shape[1:3]
    out = [-(-side // step) for side, step in zip(sides, strides, strict=True)]
    reach = [(n - 1) * step + 1 for n, step in zip(out, strides, strict=True)]
    missing = [max(r + k - 1 - side, 0) for r, k, side in zip(reach, size, sides, strict=True)]
    image = jnp.pad(image, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)))
    return sum(
        image[:, i : i + reach[0] : strides[0], j : j + reach[1] : strides[1]] * kernel[i, j, 0]
        for i in range(size[0])
        for j in range(size[1])
    )


def _conv(features: int, size: int, stride: int, dtype: jnp.dtype, name: str, **kwargs) -> nn.Conv:
    return nn.Conv(
        features, (size, size), (stride, stride), padding="SAME", dtype=dtype, name=name, **kwargs
    )


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection without activation.

    The input is added if input and output have the same shape.
    """

    width: int
    kernel: int
    stride: int
    expansion: int
    dtype: jnp.dtype
    conv: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, ceil(h / stride), ceil(w / stride), width]."""
        hidden, y = x.shape[-1] * self.expansion, x
        if self.expansion != 1:
            y = nn.relu6(_conv(hidden, 1, 1, self.dtype, "expand")(y))
        y = _conv(
            hidden,
            self.kernel,
            self.stride,
            self.dtype,
            "depthwise",
            feature_group_count=hidden,
            conv_general_dilated=depthwise if self.conv == "auto" else None,
        )(y)
        y = nn.relu6(y)
        y = _conv(self.width, 1, 1, self.dtype, "project")(y)
        return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
    """Multi-scale features of one image batch.

    Attributes:
      arch: which EfficientNet.
      taps: after which stages to return features; nothing after the last stage is computed.
      dtype: compute dtype; parameters stay float32.
      conv: "auto", depthwise convolutions by `depthwise`; or "direct", by XLA's convolution.
    """

    arch: Architecture
    taps: tuple[int, ...] = (2, 3, 5)
    dtype: jnp.dtype = jnp.float32
    conv: str = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[int, jax.Array]:
        """Maps normalised RGB [b, h, w, 3] to {tap: [b, h / stride, w / stride, c]}."""
        x = nn.relu6(_conv(STEM, 3, 2, self.dtype, "stem")(images.astype(self.dtype)))
        features = {}
        for stage in range(1, max(self.taps) + 1):
            for i in range(self.arch.blocks[stage - 1]):
                x = Block(
                    width=self.arch.widths[stage - 1],
                    kernel=KERNELS[stage - 1],
                    stride=STRIDES[stage - 1] if i == 0 else 1,
                    expansion=EXPANSIONS[stage - 1],
                    dtype=self.dtype,
                    conv=self.conv,
                    name=f"stage{stage}_{i}",
                )(x)
            if stage in self.taps:
                features[stage] = x
        return features

"""ResNet teachers, tapped after layers 1 to 3, with BatchNorm folded into the convolutions.

The frozen teacher of MMR (arXiv 2304.02216, section 4.1) and the backbone of PatchCore. Only stem
and layers 1-3 exist. Every convolution has a bias, which holds the folded BatchNorm
(`mmrjax.weights.torch_names` folds it in float32 when weights are read).
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import winograd

# Per-channel statistics of ImageNet, for RGB in [0, 1], as every torchvision teacher expects them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One member of the ResNet family (He et al. 2016; Zagoruyko & Komodakis 2016).

    `widths` are the planes of layers 1-3 before the bottleneck's expansion; `inner_factor` widens
    the 3x3 convolution of a bottleneck (2 for WideResNet-*-2). `caffe` is the authors' first form:
    the stride of a bottleneck lies on its first 1x1 convolution, and the pooling after the stem
    rounds up and does not pad.
    """

    blocks: tuple[int, int, int]
    bottleneck: bool
    inner_factor: int = 1
    stem: int = 64
    widths: tuple[int, int, int] = (64, 128, 256)
    caffe: bool = False
    taps: ClassVar = (1, 2, 3)  # as `backbones.Architecture`
    mean: ClassVar = IMAGENET_MEAN
    std: ClassVar = IMAGENET_STD
    multiple: ClassVar = 1

    @property
    def channels(self) -> tuple[int, int, int]:
        """Output channels of layers 1-3."""
        return tuple(width * (4 if self.bottleneck else 1) for width in self.widths)

    def tap(self, number: int) -> tuple[int, int]:
        """(channels, stride in px) after a layer; ValueError beyond layers 1 to 3."""
        if number not in self.taps:
            raise ValueError(f"teacher.taps: a ResNet is tapped after layers 1 to 3, not {number}")
        return self.channels[number - 1], 2 ** (number + 1)

    def module(self, taps: tuple[int, ...], dtype: jnp.dtype, conv: str) -> "ResNet":
        """The network through the last of `taps`."""
        return ResNet(self, taps, dtype, conv)


ARCHITECTURES = {
    "resnet18": Architecture((2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6), bottleneck=False),
    "resnet50": Architecture((3, 4, 6), bottleneck=True),
    "resnet50_caffe": Architecture((3, 4, 6), bottleneck=True, caffe=True),
    "resnet101": Architecture((3, 4, 23), bottleneck=True),
    "wide_resnet50_2": Architecture((3, 4, 6), bottleneck=True, inner_factor=2),
    "wide_resnet101_2": Architecture((3, 4, 23), bottleneck=True, inner_factor=2),
}


def _conv(
    features: int, size: int, stride: int, dtype: jnp.dtype, name: str, convolve=None
) -> nn.Conv:
    """A convolution of `size` x `size`; `convolve` replaces XLA's.

    torch pads symmetrically; "SAME" would shift every stride-2 convolution at even sizes.
    """
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=size // 2,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


def _folded_stem(image, kernel, strides, padding, **kwargs) -> jax.Array:
    """The 7 x 7 convolution of stride 2 as a 4 x 4 convolution of stride 1 on blocks of 2 x 2 px.

    Three channels leave a tensor core mostly idle; the twelve channels of a block, filled up to
    sixteen, do not. A row and a column of zeros are added to the kernel. The sums are the same, in
    another order.
    """
    b, h, w, c = image.shape
    image = jnp.pad(image, ((0, 0), (3, 3), (3, 3), (0, 0)))
    image = image.reshape(b, h // 2 + 3, 2, w // 2 + 3, 2, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
    kernel = kernel.reshape(4, 2, 4, 2, c, -1).transpose(0, 2, 1, 3, 4, 5)
    image = jnp.pad(image.reshape(*image.shape[:3], 4 * c), ((0, 0),) * 3 + ((0, 4),))
    kernel = jnp.pad(kernel.reshape(4, 4, 4 * c, -1), ((0, 0), (0, 0), (0, 4), (0, 0)))
    return jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or the 1x1-3x3-1x1 bottleneck (stride on the 3x3).

    With `caffe` the bottleneck's stride lies on its first 1x1.
    """

    width: int
    stride: int
    bottleneck: bool
    inner_factor: int
    dtype: jnp.dtype
    conv: str = "auto"
    caffe: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, h, w, c] -> [b, h / stride, w / stride, out]."""
        convolve = winograd.by_name(self.conv)
        first, second = (self.stride, 1) if self.caffe else (1, self.stride)
        strided = convolve if second == 1 else None  # tiles are for stride 1 alone
        out = self.width * (4 if self.bottleneck else 1)
        if self.bottleneck:
            inner = self.width * self.inner_factor
            y = nn.relu(_conv(inner, 1, first, self.dtype, "conv1")(x))
            y = nn.relu(_conv(inner, 3, second, self.dtype, "conv2", strided)(y))
            y = _conv(out, 1, 1, self.dtype, "conv3")(y)
        else:
            y = nn.relu(_conv(out, 3, self.stride, self.dtype, "conv1", strided)(x))
            y = _conv(out, 3, 1, self.dtype, "conv2", convolve)(y)
        if self.stride != 1 or x.shape[-1] != out:
            x = _conv(out, 1, self.stride, self.dtype, "downsample")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Multi-scale features of one image batch.

    Attributes:
      arch: which ResNet.
      layers: which of layers 1-3 to return; nothing after the last of them is computed.
      dtype: compute dtype; parameters stay float32.
      conv: how 3x3 convolutions of stride 1 are computed, see `winograd.by_name`.
    """

    arch: Architecture
    layers: tuple[int, ...] = (1, 2, 3)
    dtype: jnp.dtype = jnp.float32
    conv: str = "auto"

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[int, jax.Array]:
        """Maps normalised RGB [b, h, w, 3] to {layer: [b, h/2^(layer+1), w/2^(layer+1), c]}."""
        folds = self.dtype == jnp.bfloat16 and images.shape[1] % 2 == images.shape[2] % 2 == 0
        stem = _conv(self.arch.stem, 7, 2, self.dtype, "conv1", _folded_stem if folds else None)
        x = nn.relu(stem(images.astype(self.dtype)))
        before = 0 if self.arch.caffe else 1
        after = [side % 2 == 0 for side in x.shape[1:3]] if self.arch.caffe else [1, 1]
        x = nn.max_pool(x, (3, 3), (2, 2), padding=[(before, int(n)) for n in after])
        features = {}
        for layer in range(1, max(self.layers) + 1):
            for i in range(self.arch.blocks[layer - 1]):
                x = Block(
                    width=self.arch.widths[layer - 1],
                    stride=2 if layer > 1 and i == 0 else 1,
                    bottleneck=self.arch.bottleneck,
                    inner_factor=self.arch.inner_factor,
                    dtype=self.dtype,
                    conv=self.conv,
                    caffe=self.arch.caffe,
                    name=f"layer{layer}_{i}",
                )(x)
            if layer in self.layers:
                features[layer] = x
        return features

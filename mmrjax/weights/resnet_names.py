"""ResNets under torchvision's names: state dicts <-> variables of `models.resnet.ResNet`."""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.models import resnet
from mmrjax.weights import batch_norm, layouts
from mmrjax.weights.layouts import Name, State

BATCH_NORM_EPSILON = 1e-5
_UNUSED = re.compile(r"(layer4|fc)\.|.*num_batches_tracked$")


def names(arch: resnet.Architecture) -> Iterator[Name]:
    """Yields (convolution key, BatchNorm key, variable path) of stem and layers 1-3."""
    yield "conv1", "bn1", "conv1"
    last = 4 if arch.bottleneck else 3
    for layer, blocks in enumerate(arch.blocks, start=1):
        for i in range(blocks):
            torch, jax = f"layer{layer}.{i}", f"layer{layer}_{i}"
            for c in range(1, last):
                yield f"{torch}.conv{c}", f"{torch}.bn{c}", f"{jax}/conv{c}"
            if i == 0 and (layer > 1 or arch.channels[0] != arch.stem):
                yield f"{torch}.downsample.0", f"{torch}.downsample.1", f"{jax}/downsample"


def from_torch(state: State, arch: resnet.Architecture) -> dict:
    """Torchvision ResNet state dict -> {"params"} of `models.resnet.ResNet`, BatchNorm folded.

    w' = w * gamma / sqrt(var + 1e-5), b' = beta - mean * gamma / sqrt(var + 1e-5), in float32.
    layer4 and fc are ignored.

    Raises:
      ValueError: naming tensors that are missing, unexpected or of another shape, with both shapes.
    """
    check(state, arch, "weights of another architecture")
    return batch_norm.fold(used(state), names(arch), BATCH_NORM_EPSILON)


def to_torch(variables: dict, arch: resnet.Architecture) -> State:
    """Variables of `models.resnet.ResNet` -> torchvision state dict of stem and layers 1-3.

    The folded BatchNorm becomes one of weight 1, mean 0 and variance 1 - 1e-5, whose scale is
    exactly 1 in float32: folding it again gives the same bits.

    Raises:
      ValueError: naming the variables that are absent.
    """
    return layouts.contiguous(_views(variables, arch))


def check(state: State, arch: resnet.Architecture, what: str) -> None:
    """Raises ValueError unless a state dict fits a teacher; the message begins with `what`."""
    like = layouts.hollow(resnet.ResNet(arch).init, jnp.zeros((1, 64, 64, 3)))
    layouts.check_fit(used(state), _views(like, arch), what)


def used(state: State) -> State:
    """The used part of a torchvision ResNet: without layer4, fc and counters of batches."""
    return {key: value for key, value in state.items() if not _UNUSED.match(key)}


def _views(variables: dict, arch: resnet.Architecture) -> State:
    return batch_norm.unfold(variables, names(arch), BATCH_NORM_EPSILON)


def random(arch: resnet.Architecture, seed: int) -> dict:
    """Torchvision's initial values: Kaiming-normal (fan-out), BatchNorm 1/0, folded."""
    rng = np.random.default_rng(seed)

    def draw(leaf: np.ndarray) -> np.ndarray:
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        fan_out = leaf.shape[0] * leaf.shape[1] * leaf.shape[3]
        scale = np.sqrt(2.0 / fan_out / (1 + BATCH_NORM_EPSILON))
        return (rng.standard_normal(leaf.shape) * scale).astype(np.float32)

    return jax.tree.map(draw, layouts.hollow(resnet.ResNet(arch).init, jnp.zeros((1, 64, 64, 3))))

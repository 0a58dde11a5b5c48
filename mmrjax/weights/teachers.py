"""Teachers of every family under PyTorch's names: one table from architectures to their names.

A family is a module with `from_torch(state, arch)`, `to_torch(variables, arch)`,
`check(state, arch, what)`, `used(state)` and `random(arch, seed)`, see `resnet_names`.
"""

import types

from mmrjax.models import backbones, efficientnet, resnet, vit_backbone
from mmrjax.weights import efficientnet_names, resnet_names, vit_names
from mmrjax.weights.layouts import State

FAMILIES: dict[type, types.ModuleType] = {
    resnet.Architecture: resnet_names,
    efficientnet.Architecture: efficientnet_names,
    vit_backbone.Architecture: vit_names,
}


def from_torch(state: State, arch: backbones.Architecture) -> dict:
    """A state dict -> {"params"} of the architecture's module, float32.

    Raises:
      ValueError: naming tensors that are missing, unexpected or of another shape, with both shapes.
    """
    return FAMILIES[type(arch)].from_torch(state, arch)


def to_torch(variables: dict, arch: backbones.Architecture) -> State:
    """Variables of the architecture's module -> state dict; `from_torch` gives the same bits.

    Raises:
      ValueError: naming the variables that are absent.
    """
    return FAMILIES[type(arch)].to_torch(variables, arch)


def check(state: State, arch: backbones.Architecture, what: str) -> None:
    """Raises ValueError unless a state dict fits a teacher; the message begins with `what`."""
    FAMILIES[type(arch)].check(state, arch, what)


def used(state: State, arch: backbones.Architecture) -> State:
    """The part of a state dict that `from_torch` reads: without heads and counters of batches."""
    return FAMILIES[type(arch)].used(state)


def random(arch: backbones.Architecture, seed: int) -> dict:
    """Fresh variables of the architecture's module, as its family's authors draw them; float32."""
    return FAMILIES[type(arch)].random(arch, seed)

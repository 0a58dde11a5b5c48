"""Frozen backbones of every family behind one interface: maps, channels, strides, normalisation.

A method numbers the maps that it reads 1, 2, 3, … from shallow to deep ("layers"). A family names
its maps by the stage or block after which they are taken ("taps"). `teacher.taps` says which tap is
layer 1, which is layer 2, and so on; every family has a default. No method asks for a family.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import efficientnet, resnet, vit_backbone


class Architecture(Protocol):
    """One network of a family.

    Attributes:
      taps: the taps that are layers 1, 2, 3, … by default.
      mean, std: statistics of RGB in [0, 1] that the weights were trained with.
      multiple: sides of an image must be multiples of so many px; 1: any side.
    """

    taps: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    multiple: int

    def tap(self, number: int) -> tuple[int, int]:
        """(channels, stride in px) of a tap; ValueError if there is no such tap."""

    def module(self, taps: tuple[int, ...], dtype: jnp.dtype, conv: str) -> nn.Module:
        """The network: normalised RGB [b, h, w, 3] -> {tap: [b, h / stride, w / stride, c]}."""


FAMILIES: tuple[Mapping[str, Architecture], ...] = (
    resnet.ARCHITECTURES,
    efficientnet.ARCHITECTURES,
    vit_backbone.ARCHITECTURES,
)


def names() -> list[str]:
    """All known backbones, sorted."""
    return sorted(name for family in FAMILIES for name in family)


def architecture(name: str) -> Architecture:
    """The architecture called `name`; ValueError lists the known names."""
    for family in FAMILIES:
        if name in family:
            return family[name]
    raise ValueError(f"unknown teacher {name!r}; available: {', '.join(names())}")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone as a method sees it.

    Attributes:
      arch: the architecture.
      module: the flax module; its variables come from `weights.load_teacher`.
      taps: {layer: tap} of the layers that are computed.
      channels: {layer: channels}.
      strides: {layer: px of the image per cell}.
    """

    arch: Architecture
    module: nn.Module
    taps: Mapping[int, int]
    channels: Mapping[int, int]
    strides: Mapping[int, int]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, from shallow to deep."""
        return tuple(sorted(self.taps))

    def with_conv(self, conv: str) -> "Backbone":
        """The same backbone with convolutions computed in another way, if the family has ways."""
        if not hasattr(self.module, "conv"):
            return self
        return dataclasses.replace(self, module=self.module.clone(conv=conv))

    def check_size(self, size_hw: tuple[int, int]) -> None:
        """Raises ValueError unless the network takes images of so many px."""
        multiple = self.arch.multiple
        if any(side % multiple for side in size_hw):
            near = ",".join(str(max(1, round(side / multiple)) * multiple) for side in size_hw)
            raise ValueError(
                f"this teacher sees images whose sides are multiples of {multiple} px, not "
                f"{size_hw[0]} x {size_hw[1]}: --config.data.image_size={near}"
            )

    def normalise(self, images: jax.Array) -> jax.Array:
        """Subtracts the mean, divides by the deviation; RGB [b, h, w, 3] in [0, 1]."""
        return (images - jnp.asarray(self.arch.mean)) / jnp.asarray(self.arch.std)

    def apply(self, variables: dict, images: jax.Array) -> dict[int, jax.Array]:
        """Normalised RGB [b, h, w, 3] -> {layer: [b, h / stride, w / stride, c]}."""
        features = self.module.apply(variables, images)
        return {layer: features[tap] for layer, tap in self.taps.items()}


def build(
    name: str,
    layers: tuple[int, ...] = (),
    dtype: jnp.dtype = jnp.float32,
    taps: tuple[int, ...] = (),
    conv: str = "auto",
    changes: Mapping[str, object] = types.MappingProxyType({}),
) -> Backbone:
    """Builds a backbone; nothing after the deepest of its layers is computed.

    Args:
      name: of `names()`.
      layers: which layers to return; () = all.
      dtype: compute dtype; parameters stay float32.
      taps: the taps that are layers 1, 2, 3, …; () = the family's default.
      conv: see `winograd.by_name`.
      changes: fields in which the architecture differs from the one called `name`.

    Raises:
      ValueError: an unknown name, layer, tap or field.
    """
    arch = architecture(name)
    try:
        arch = dataclasses.replace(arch, **changes)
    except TypeError as e:  # no such field
        fields = " and ".join(f"teacher.{field}" for field in changes)
        raise ValueError(f"{fields}: for ViTs alone, and teacher {name} is none") from e
    taps = tuple(taps) or arch.taps
    layers = tuple(layers) or tuple(range(1, len(taps) + 1))
    if unknown := [layer for layer in layers if not 1 <= layer <= len(taps)]:
        raise ValueError(
            f"teacher {name} has layers 1 to {len(taps)} (after {', '.join(map(str, taps))}), not "
            f"{unknown[0]}; --config.teacher.taps chooses others"
        )
    used = {layer: taps[layer - 1] for layer in layers}
    sizes = {layer: arch.tap(tap) for layer, tap in used.items()}
    return Backbone(
        arch,
        arch.module(tuple(sorted(used.values())), dtype, conv),
        used,
        {layer: channels for layer, (channels, _) in sizes.items()},
        {layer: stride for layer, (_, stride) in sizes.items()},
    )

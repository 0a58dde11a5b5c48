"""Vision transformers as frozen backbones: timm and DeiT ViTs, DINO, DINOv2 and DINOv3.

Facts: arXiv 2010.11929 (ViT), 2104.14294 (DINO), 2304.07193 and 2309.16588 (DINOv2, registers),
2508.10104 (DINOv3). Block N is counted from 1: tap 12 of a ViT-B is the output of its last block.
A tap is the map of the patch tokens, without class token and registers. The network's final norm
is applied to every tap, as get_intermediate_layers of the official codes does, unless
`Architecture.normed` is False. `ViT.tokens` also returns class token and registers.
"""

import dataclasses
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.models import attention, norm, patches, positions, resnet

EXACT = jax.lax.Precision.HIGHEST
HALF = (0.5, 0.5, 0.5)  # mean and deviation of the ViTs that Google trained
ROTARY_BASE = 100.0  # of DINOv3's periods


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One vision transformer.

    Attributes:
      width: channels of a token.
      depth: number of blocks.
      heads: attention heads.
      patch: side of a patch, px.
      taps: as `backbones.Architecture`, blocks counted from 1.
      table: cells per side of the learned position table; 0: rotary positions (DINOv3).
      positions: how the table is brought to another grid, of positions.TABLE_MODES.
      registers: extra tokens behind the class token, without positions.
      scaled: whether each branch of a block is scaled per channel (LayerScale).
      hidden: width inside a block's MLP; 0: four times `width`.
      swiglu: the MLP is fc2(silu(a) * b) with (a, b) = fc1(x), instead of fc2(gelu(fc1(x))).
      masked: the weights have a token for masked patches (used in pretraining alone).
      epsilon: that of every norm.
      normed: whether taps are normed by the network's final norm.
      mean: as `backbones.Architecture`.
      std: as `backbones.Architecture`.
    """

    width: int
    depth: int
    heads: int
    patch: int
    taps: tuple[int, ...]
    table: int
    positions: str = "antialias"
    registers: int = 0
    scaled: bool = False
    hidden: int = 0
    swiglu: bool = False
    masked: bool = False
    epsilon: float = norm.EPSILON
    normed: bool = True
    mean: tuple[float, float, float] = resnet.IMAGENET_MEAN
    std: tuple[float, float, float] = resnet.IMAGENET_STD

    def __post_init__(self):
        if self.positions not in positions.TABLE_MODES:
            known = ", ".join(positions.TABLE_MODES)
            raise ValueError(f"teacher.positions={self.positions!r}: known are {known}")

    @property
    def multiple(self) -> int:
        """Sides of an image are multiples of the patch."""
        return self.patch

    def tap(self, number: int) -> tuple[int, int]:
        """(channels, stride in px) after a block; ValueError beyond the blocks."""
        if not 1 <= number <= self.depth:
            raise ValueError(
                f"teacher.taps: this ViT is tapped after blocks 1 to {self.depth}, not {number}"
            )
        return self.width, self.patch

    def module(self, taps: tuple[int, ...], dtype: jnp.dtype, conv: str) -> "ViT":
        """The network through the last of `taps`; `conv` has no meaning here."""
        return ViT(self, taps, dtype)


class ViT(nn.Module):
    """The tokens, or maps of tokens, after chosen blocks.

    Attributes:
      arch: which transformer.
      taps: blocks, from 1; nothing after the last of them is computed. 0 stands for the tokens
        before block 1, which are never normed.
      dtype: compute dtype; parameters stay float32.
    """

    arch: Architecture
    taps: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    def __call__(self, images: jax.Array) -> dict[int, jax.Array]:
        """Normalised RGB [b, h, w, 3] -> {block: patch tokens [b, h / patch, w / patch, d]}.

        Raises:
          ValueError: a side of the images is no multiple of the patch.
        """
        grid = [side // self.arch.patch for side in images.shape[1:3]]
        first = 1 + self.arch.registers
        return {
            tap: x[:, first:].reshape(x.shape[0], *grid, x.shape[-1])
            for tap, x in self.tokens(images).items()
        }

    @nn.compact
    def tokens(self, images: jax.Array, masked: jax.Array | None = None) -> dict[int, jax.Array]:
        """All tokens after the tapped blocks.

        Args:
          images: normalised RGB [b, h, w, 3].
          masked: bool [b, n], patches that the mask token replaces; None: none.

        Returns:
          {block: [b, 1 + registers + n, d]}: class token, registers, patches row by row.

        Raises:
          ValueError: a side of the images is no multiple of the patch.
        """
        arch, dtype = self.arch, self.dtype
        grid = _grid(images.shape[1:3], arch.patch)
        x = patches.patchify(images.astype(dtype), arch.patch)
        x = nn.Dense(arch.width, dtype=dtype, name="patch")(x)  # [b, n, d]
        if arch.masked:
            token = self.param("mask_token", nn.initializers.zeros, (1, arch.width))
            if masked is not None:
                x = jnp.where(masked[..., None], token.astype(dtype), x)
        x = self._with_extra_tokens(x, grid)
        rotation = self._rotation(grid) if not arch.table else None
        final = norm.layer_norm(dtype, "norm", arch.epsilon)
        found = {0: x} if 0 in self.taps else {}
        for number in range(1, max(self.taps) + 1):
            x = Block(arch, dtype, name=f"block_{number - 1}")(x, rotation)
            if number in self.taps:
                found[number] = final(x) if arch.normed else x
        return found

    def _with_extra_tokens(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Puts class token and registers in front and adds positions: [b, 1 + registers + n, d]."""
        arch, draw = self.arch, nn.initializers.truncated_normal(0.02)
        extra = self.param("class_token", draw, (1, arch.width))
        if arch.table:
            table = self.param("positions", draw, (1 + arch.table**2, arch.width))
            x = x + positions.resized(table[1:], arch.table, grid, arch.positions).astype(x.dtype)
            extra = extra + table[:1]
        if arch.registers:
            registers = self.param("registers", draw, (arch.registers, arch.width))
            extra = jnp.concatenate([extra, registers])
        extra = jnp.broadcast_to(extra.astype(x.dtype), (x.shape[0], *extra.shape))
        return jnp.concatenate([extra, x], axis=1)

    def _rotation(self, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines of DINOv3's rotary positions, float32 [n, head / 2] each."""
        quarter = self.arch.width // self.arch.heads // 4
        periods = self.param("periods", lambda key, shape: rotary_periods(shape[0]), (quarter,))
        angles = rotary_angles(grid, periods)
        return jnp.cos(angles), jnp.sin(angles)


class Block(nn.Module):
    """x += scale1 * attention(norm(x)); x += scale2 * mlp(norm(x)); without scales if none."""

    arch: Architecture
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, rotation) -> jax.Array:
        """[b, n, d] -> [b, n, d]; `rotation` as of `ViT._rotation`, or None."""
        arch = self.arch
        y = norm.layer_norm(self.dtype, "norm1", arch.epsilon)(x)
        x = x + self._scaled("scale1", self._attention(y, rotation))
        y = norm.layer_norm(self.dtype, "norm2", arch.epsilon)(x)
        return x + self._scaled("scale2", self._mlp(y))

    def _attention(self, x: jax.Array, rotation) -> jax.Array:
        b, n, d = x.shape
        qkv = nn.Dense(3 * d, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.arch.heads, -1), 2, 0)
        if rotation is not None:
            q, k = (rotate(z, *rotation) for z in (q, k))
        x = attention.attention_by_rows(q, k, v).reshape(b, n, d)
        return nn.Dense(d, dtype=self.dtype, name="proj")(x)

    def _mlp(self, x: jax.Array) -> jax.Array:
        d, hidden = x.shape[-1], self.arch.hidden or 4 * x.shape[-1]
        if self.arch.swiglu:
            gate, x = jnp.split(nn.Dense(2 * hidden, dtype=self.dtype, name="fc1")(x), 2, axis=-1)
            x = nn.silu(gate) * x
        else:
            x = norm.gelu(nn.Dense(hidden, dtype=self.dtype, name="fc1")(x))
        return nn.Dense(d, dtype=self.dtype, name="fc2")(x)

    def _scaled(self, name: str, x: jax.Array) -> jax.Array:
        if not self.arch.scaled:
            return x
        return x * self.param(name, nn.initializers.ones, x.shape[-1:]).astype(x.dtype)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotates the channels (i, i + c / 2) of patch tokens; the tokens before them stay.

    Args:
      x: queries or keys [b, m, heads, c], of which the last n are patches.
      cosines: float32 [n, c / 2].
      sines: float32 [n, c / 2].

    Returns:
      [b, m, heads, c], the type of `x`.
    """
    first = x.shape[1] - len(cosines)
    a, b = jnp.split(x[:, first:].astype(jnp.float32), 2, axis=-1)
    cosines, sines = cosines[:, None], sines[:, None]
    turned = jnp.concatenate([a * cosines - b * sines, b * cosines + a * sines], axis=-1)
    return jnp.concatenate([x[:, :first], turned.astype(x.dtype)], axis=1)


def rotary_angles(grid: tuple[int, int], periods: jax.Array) -> jax.Array:
    """The angles by which DINOv3 turns the patches' channels.

    Rows and columns of cell centres run from -1 to 1; the first quarter of a head's channels turns
    with the row, the second with the column.

    Args:
      grid: cells per column and per row.
      periods: float32 [head / 4].

    Returns:
      float32 [n, head / 2].
    """
    row, column = np.indices(grid).reshape(2, -1)
    place = np.stack([(row + 0.5) / grid[0], (column + 0.5) / grid[1]], axis=1) * 2 - 1
    angles = 2 * np.pi * place.astype(np.float32)[:, :, None] / periods  # [n, 2, head / 4]
    return angles.reshape(len(place), -1)


def rotary_periods(count: int) -> jax.Array:
    """DINOv3's periods 100^(i / count), float32 [count]; official files hold them in bfloat16."""
    return ROTARY_BASE ** (jnp.arange(count, dtype=jnp.float32) / count)


def _grid(size_hw: tuple[int, int], patch: int) -> tuple[int, int]:
    if any(side % patch for side in size_hw):
        raise ValueError(
            f"a ViT with patches of {patch} px sees images whose sides are multiples of {patch} "
            f"px, not {size_hw[0]} x {size_hw[1]}"
        )
    return size_hw[0] // patch, size_hw[1] // patch


def _plain(width: int, depth: int, patch: int = 16, table: int = 0, **facts) -> Architecture:
    """A ViT with heads of 64 channels, trained at 224 px unless `table` says otherwise."""
    taps = tuple(depth * third // 3 for third in (1, 2, 3))
    table = table or 224 // patch
    return Architecture(width, depth, width // 64, patch, taps, table, **facts)


SMALL, BASE, LARGE, GIANT = (384, 12), (768, 12), (1024, 24), (1536, 40)  # (width, depth)
_DINO2 = {"patch": 14, "table": 37, "scaled": True, "masked": True}
_SIZES = {"s": SMALL, "b": BASE, "l": LARGE, "g": GIANT}


def _dino2() -> dict[str, Architecture]:
    """DINOv2 of four sizes; the official code brings tables to a grid in two ways."""
    found = {}
    for letter, size in _SIZES.items():
        facts = _DINO2 | ({"swiglu": True, "hidden": 4096} if letter == "g" else {})
        found[f"dinov2_vit{letter}14"] = _plain(*size, **facts, positions="offset")
        found[f"dinov2_vit{letter}14_reg4"] = _plain(*size, **facts, registers=4)
    return found


def _dino3(width: int, depth: int, hidden: int = 0) -> Architecture:
    """DINOv3; `hidden` of the "plus" sizes is that of a SwiGLU."""
    return dataclasses.replace(
        _plain(width, depth, scaled=True, masked=True, registers=4, epsilon=1e-5),
        table=0,
        hidden=hidden,
        swiglu=bool(hidden),
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    "vit_tiny_patch16_224": _plain(192, 12, mean=HALF, std=HALF),
    "vit_small_patch16_224": _plain(*SMALL, mean=HALF, std=HALF),
    "vit_base_patch16_224": _plain(*BASE, mean=HALF, std=HALF),
    "vit_large_patch16_224": _plain(*LARGE, mean=HALF, std=HALF),
    "deit_tiny_patch16_224": _plain(192, 12),
    "deit_small_patch16_224": _plain(*SMALL),
    "deit_base_patch16_224": _plain(*BASE),
    "dino_vits16": _plain(*SMALL, positions="offset"),
    "dino_vits8": _plain(*SMALL, patch=8, positions="offset"),
    "dino_vitb16": _plain(*BASE, positions="offset"),
    "dino_vitb8": _plain(*BASE, patch=8, positions="offset"),
    **_dino2(),
    "dinov3_vits16": _dino3(*SMALL),
    "dinov3_vits16plus": _dino3(*SMALL, hidden=1536),
    "dinov3_vitb16": _dino3(*BASE),
    "dinov3_vitl16": _dino3(*LARGE),
    "dinov3_vith16plus": _dino3(1280, 32, hidden=5120),
}

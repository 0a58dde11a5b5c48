"""Masked autoencoder (He et al. 2022, arXiv 2111.06377): one ViT sees a part, one paints the whole.

Parameters map one to one to the official code's, see weights/mae_names.py. Shapes: b batch, n
patches, k visible ones, p patch side, d width, e width of the decoder.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.models import fpn, masking, norm, patches, positions, vit

GRID = (14, 14)  # patches of a 224 px image: the encoder's table is resized from this grid
GROUPS = 4  # passes of `hidden_error`, with disjoint sets of visible patches
TOKEN = nn.initializers.normal(0.02)


class Tapped(nn.Module):
    """`vit.Encoder`, with the same parameters, which also gives the output of its first block.

    Attributes: as those of `vit.Encoder`.
    """

    depth: int
    heads: int
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[b, n, d] -> (after the first block, after the last block and the norm), [b, n, d]."""
        if x.shape[-1] % self.heads:
            raise ValueError(f"width={x.shape[-1]} must be divisible by heads={self.heads}")

        def body(block, carried, layer):
            x, first = carried
            x, _ = block(x, None, None)
            return (x, jnp.where(layer == 0, x, first)), None

        block = vit.Block(self.heads, 4, norm.EPSILON, self.dtype, None, self.kernel, name="blocks")
        run = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=self.unroll,
        )
        (x, first), _ = run(block, (x, jnp.zeros_like(x)), jnp.arange(self.depth))
        return first, norm.layer_norm(self.dtype, "norm")(x)


class Decoder(nn.Module):
    """Tokens of all patches from the encoder's output, and pixels from these tokens.

    Attributes:
      width: token dimension e.
      depth: transformer blocks.
      heads: attention heads.
      entries: numbers of a patch, p * p * 3.
      unroll: blocks per scan iteration.
      dtype: compute dtype; parameters stay float32.
      kernel: see `vit.Attention`.
    """

    width: int
    depth: int
    heads: int
    entries: int
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    kernel: str = "xla"

    def setup(self):
        """The projection into the decoder, its blocks, and the projection onto pixels."""
        self.embed = nn.Dense(self.width, dtype=self.dtype, kernel_init=vit.xavier)
        self.stack = vit.Encoder(
            self.depth, self.heads, unroll=self.unroll, dtype=self.dtype, kernel=self.kernel
        )
        self.pixels = nn.Dense(self.entries, dtype=self.dtype, kernel_init=vit.xavier)

    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """[b, 1 + n, e] after `embed`, class token first, and positions [1 + n, e] -> [b, n, e]."""
        return self.stack(x + table.astype(self.dtype))[:, 1:]

    def paint(self, x: jax.Array) -> jax.Array:
        """Decoded tokens [b, n, e] -> pixels of each patch, float32 [b, n, p * p * 3]."""
        return self.pixels(x).astype(jnp.float32)


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, decoder of all patches.

    Attributes:
      grid: patches per column and per row of an image.
      width: the encoder's token dimension d.
      depth: the encoder's blocks.
      heads: the encoder's heads.
      decoder_width: token dimension e of the decoder.
      decoder_depth: blocks of the decoder.
      decoder_heads: heads of the decoder.
      zeros: whether zeros stand for hidden patches in the decoder, not a learned mask token.
      mean: of the pixels that the weights were trained on, for each channel of images in [0, 1].
      std: their deviation.
      patch: patch side p in px.
      unroll: blocks per scan iteration, of both.
      dtype: compute dtype; parameters stay float32.
      kernel: see `vit.Attention`.

    Collections: `params`; `positions`, two fixed tables, float32 [1 + n, d] and [1 + n, e].
    """

    grid: tuple[int, int]
    width: int
    depth: int
    heads: int
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    zeros: bool = False
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    patch: int = 16
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    kernel: str = "xla"

    def setup(self):
        """Tokens, patch projection, encoder and decoder."""
        entries = self.patch**2 * 3
        common = {"dtype": self.dtype, "kernel": self.kernel}
        self.cls_token = self.param("cls_token", TOKEN, (1, 1, self.width))
        self.mask_token = self.param("mask_token", TOKEN, (1, 1, self.decoder_width))
        self.patch_kernel = self.param("patch_kernel", vit.xavier, (entries, self.width))
        # MAE draws the kernel anew and leaves the bias as torch's convolution has it.
        self.patch_bias = self.param("patch_bias", fpn.uniform(entries**-0.5), (self.width,))
        own = min(self.unroll, self.depth), min(self.unroll, self.decoder_depth)
        self.encoder = Tapped(self.depth, self.heads, unroll=own[0], **common)
        sizes = self.decoder_width, self.decoder_depth, self.decoder_heads
        self.decoder = Decoder(*sizes, entries, unroll=own[1], **common)
        # The encoder's table is resized, the decoder's drawn for each image size, as MMR's are.
        seen = positions.resize_table(positions.sincos_2d(self.width, GRID), self.grid)
        painted = positions.sincos_2d(self.decoder_width, self.grid)
        tables = {"encoder_table": seen, "decoder_table": painted}
        self.tables = {
            name: self.variable("positions", name, jnp.asarray, table).value
            for name, table in tables.items()
        }

    def __call__(self, images: jax.Array, shuffle: jax.Array | None = None, visible: int = 0):
        """Pixels of all patches, predicted from the visible ones.

        Args:
          images: RGB [b, h, w, 3], in [0, 1] unless `mean` is 0 and `std` 1.
          shuffle: int [b or 1, n], the patches in an order in which the visible ones come first;
            None shows all patches.
          visible: number of visible patches.

        Returns:
          float32 [b, h, w, 3], as `images`, not clipped.
        """
        _, latent = self.encode(images, shuffle, visible)
        tokens = self.decoder.paint(self.decode(latent, shuffle))
        painted = patches.unpatchify(tokens, self.grid, self.patch)
        return painted * jnp.asarray(self.std) + jnp.asarray(self.mean)

    def encode(
        self, images: jax.Array, shuffle: jax.Array | None = None, visible: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """(tokens after the first block, tokens after all blocks and the norm).

        Arguments as in `__call__`; both [b, 1 + k, d] of `dtype`, class token first, patches in the
        order of `shuffle`.
        """
        table = self.tables["encoder_table"]
        images = (images - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        pixels = patches.patchify(images, self.patch)  # [b, n, p * p * 3]
        b = pixels.shape[0]  # a symbol in an exported program
        places = jnp.broadcast_to(table[None, 1:], (b, pixels.shape[1], self.width))
        if shuffle is not None:  # before the embedding: hidden patches cost nothing
            shown = jnp.broadcast_to(shuffle[:, :visible], (b, visible))
            pixels, places = (masking.take_tokens(x, shown) for x in (pixels, places))
        x = pixels.astype(self.dtype) @ self.patch_kernel.astype(self.dtype)
        x = x + (self.patch_bias + places).astype(self.dtype)
        first = jnp.broadcast_to(self.cls_token + table[0], (b, 1, self.width))
        return self.encoder(jnp.concatenate([first.astype(self.dtype), x], axis=1))

    def decode(self, latent: jax.Array, shuffle: jax.Array | None = None) -> jax.Array:
        """Decoded tokens of all patches.

        Args:
          latent: from `encode`, [b, 1 + k, d].
          shuffle: as given to `encode`.

        Returns:
          [b, n, e] of `dtype`, row by row, after the decoder's norm.
        """
        x = self.decoder.embed(latent)  # [b, 1 + k, e], the class token with it
        if shuffle is not None:
            b, seen, e = x.shape
            hidden = jnp.zeros_like(self.mask_token) if self.zeros else self.mask_token
            hidden = jnp.broadcast_to(hidden, (b, shuffle.shape[1] + 1 - seen, e))
            every = jnp.concatenate([x[:, 1:], hidden.astype(x.dtype)], axis=1)
            restore = jnp.broadcast_to(jnp.argsort(shuffle, axis=1), every.shape[:2])
            x = jnp.concatenate([x[:, :1], masking.take_tokens(every, restore)], axis=1)
        return self.decoder(x, self.tables["decoder_table"])


def visible_groups(count: int, groups: int, seed: int = 0) -> list[tuple[np.ndarray, int]]:
    """Disjoint sets of patches that together are all of them, as orders for `MaskedAutoencoder`.

    Args:
      count: number of patches n.
      groups: number of sets.
      seed: of the permutation.

    Returns:
      [(int [1, n], the patches of a set first; how many these are)], one for each set.
    """
    order = np.random.default_rng(seed).permutation(count)
    parts = np.array_split(order, groups)
    return [(np.concatenate([part, np.setdiff1d(order, part)])[None], len(part)) for part in parts]


def hidden_error(
    paint: Callable[[np.ndarray, int], jax.Array], images: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """How far each pixel is from what was painted while it was hidden, the mean of the channels.

    Every patch is visible in one of four passes and hidden in the others.

    Args:
      paint: (order of the patches, visible ones) -> painted images, see `MaskedAutoencoder`.
      images: float [b, h, w, 3].
      grid: patches per column and per row.

    Returns:
      float32 [b, h, w].
    """
    side = images.shape[1] // grid[0]
    total = 0.0
    for order, visible in visible_groups(grid[0] * grid[1], GROUPS):
        hidden = np.ones(order.shape[1], np.float32)
        hidden[order[0, :visible]] = 0
        hidden = hidden.reshape(grid).repeat(side, axis=0).repeat(side, axis=1)
        total = total + jnp.abs(images - paint(order, visible)).mean(axis=-1) * hidden
    return total / (GROUPS - 1)

"""The MMR student: a masked ViT encoder, one shared mask token and a simple feature pyramid.

arXiv 2304.02216, section 4.2. If paper and official code differ, this module follows the code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import attention, fpn, masking, patches, positions, vit

# Patches of a 224 px image: at other sizes the official code resizes the table of this grid.
ENCODER_GRID = (14, 14)


class MaskedStudent(nn.Module):
    """Predicts the teacher's feature maps from the visible part of an image.

    Attributes:
      width: token dimension d.
      depth: transformer blocks.
      heads: attention heads.
      channels: {layer: teacher channels}, one pyramid stage each.
      patch: patch side in px; both image sides must be multiples of it.
      unroll: blocks per scan iteration.
      dtype: compute dtype; parameters stay float32.
      hybrid: patches that each head sees (MMR+); None: all.
      kernel: that of attention without `hybrid`, see `vit.Attention`.
      conv: how 3x3 convolutions of the pyramid are computed, see `winograd.by_name`.

    Collections: `params`, trained; `positions`, two fixed tables, float32 [1 + n, d]; with `hybrid`
    also `attention`, the kind of every head, int32 [depth, heads].
    """

    width: int
    depth: int
    heads: int
    channels: dict[int, int]
    patch: int = 16
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    hybrid: attention.Hybrid | None = None
    kernel: str = "xla"
    conv: str = "auto"

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        noise: jax.Array | None = None,
        mask_ratio: float = 0.0,
        penalty: jax.Array | float = attention.HARD,
        sample: jax.Array | None = None,
    ) -> dict:
        """Runs the student.

        Args:
          images: normalised RGB, float [b, h, w, 3]; n patches of `patch` px.
          noise: float [b, n]; the lowest `kept_tokens` of each row stay visible. None (evaluation)
            shows every patch.
          mask_ratio: share in [0, 1) of patches to drop if `noise` is given; k patches are kept.
          penalty: with `hybrid`, how hard its limits are, see `attention.Tokens`.
          sample: with `hybrid`, bool [b or 1, n], the keys of global heads instead of the lattice.

        Returns:
          {layer: features [b, s h / patch, s w / patch, c], scale s = 2^(3 - layer);
          "latent": [b, 1 + k, d], class token first}, all of `dtype`.

        Raises:
          ValueError: an image side is no multiple of `patch`.
        """
        b, h, w, _ = images.shape
        grid = h // self.patch, w // self.patch
        if (grid[0] * self.patch, grid[1] * self.patch) != (h, w):
            raise ValueError(f"image size {(h, w)} must be a multiple of the patch {self.patch}")
        encoder_table, decoder_table = self._position_tables(grid)
        pixels = patches.patchify(images, self.patch)  # [b, n, p * p * 3]
        n = pixels.shape[1]
        visible = jnp.arange(n)[None]  # [1, n]
        table = jnp.broadcast_to(encoder_table[None, 1:], (b, n, self.width))  # [b, n, d]
        if noise is not None:
            kept = masking.kept_tokens(n, mask_ratio)
            ids_shuffle, ids_restore = masking.shuffle(noise)
            # Dropped patches leave before the embedding: they cost nothing and cannot leak.
            visible = ids_shuffle[:, :kept]  # [b, k]
            pixels = masking.take_tokens(pixels, visible)  # [b, k, p * p * 3]
            table = masking.take_tokens(table, visible)  # [b, k, d]
        token_init = nn.initializers.normal(0.02)
        tokens = self._embed(pixels) + table.astype(self.dtype)  # [b, k, d]
        cls_token = self.param("cls_token", token_init, (1, 1, self.width))
        first = jnp.broadcast_to(cls_token + encoder_table[0], (b, 1, self.width))
        tokens = jnp.concatenate([first.astype(self.dtype), tokens], axis=1)  # [b, 1 + k, d]
        latent = self._encode(tokens, attention.Tokens(visible, penalty, sample, grid))
        mask_token = self.param("mask_token", token_init, (1, 1, self.width))
        x = latent[:, 1:]  # [b, k, d]
        if noise is not None:
            masked = jnp.broadcast_to(mask_token, (b, n - kept, self.width)).astype(self.dtype)
            x = masking.take_tokens(jnp.concatenate([x, masked], axis=1), ids_restore)  # [b, n, d]
        x = x + decoder_table[None, 1:].astype(self.dtype)
        pyramid = fpn.SimpleFPN(self.channels, self.dtype, self.conv, name="fpn")
        return {**pyramid(x.reshape(b, *grid, self.width)), "latent": latent}

    def _encode(self, x: jax.Array, tokens: attention.Tokens) -> jax.Array:
        """The encoder's output for tokens [b, 1 + k, d], class token first; the same shape."""
        encoder = vit.Encoder(
            self.depth,
            self.heads,
            unroll=self.unroll,
            dtype=self.dtype,
            hybrid=self.hybrid,
            kernel=self.kernel,
            name="encoder",
        )
        if self.hybrid is None:
            return encoder(x)
        kinds = self.variable("attention", "kinds", lambda: jnp.asarray(self.hybrid.kinds))
        return encoder(x, tokens, kinds.value)

    def _position_tables(self, grid: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
        """(the encoder's 14x14 table, resized; the decoder's table), both float32 [1 + n, d]."""
        resized = positions.resize_table(positions.sincos_2d(self.width, ENCODER_GRID), grid)
        encoder = self.variable("positions", "encoder_table", lambda: jnp.asarray(resized))
        fresh = positions.sincos_2d(self.width, grid)
        decoder = self.variable("positions", "decoder_table", lambda: jnp.asarray(fresh))
        return encoder.value, decoder.value

    def _embed(self, pixels: jax.Array) -> jax.Array:
        """The patch convolution as a matrix product: [b, k, p * p * 3] -> [b, k, d]."""
        fan_in = pixels.shape[-1]
        kernel = self.param("patch_kernel", vit.xavier, (fan_in, self.width))
        bias = self.param("patch_bias", fpn.uniform(fan_in**-0.5), (self.width,))
        return pixels.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)

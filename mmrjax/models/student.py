"""The MMR student: a masked ViT encoder, one shared mask token and a simple feature pyramid.

arXiv 2304.02216, section 4.2; where paper and official code differ, the code is followed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import attention, fpn, masking, patches, positions, vit

# The position table of the encoder is that of a 224 px image at every image size (official code).
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
      hybrid: what each head sees (MMR+); None: everything.
      kernel: of plain attention, see `vit.Attention`.

    Collections: `params`, trained; `positions`, the two fixed tables; with `hybrid` also
    `attention`, the kind of every head, int32 [depth, heads].
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
          images: normalised RGB [b, h, w, 3].
          noise: float [b, n], n patches; the lowest `kept_tokens` of each row stay visible. None
            (evaluation) shows every patch.
          mask_ratio: share of patches to drop when `noise` is given.
          penalty: with `hybrid`, how hard its limits are, see `attention.Tokens`.
          sample: with `hybrid`, the keys of its global heads instead of the lattice, the same.

        Returns:
          {layer: features [b, h_l, w_l, c_l], "latent": [b, 1 + k, d], class token first}.
        """
        b, h, w, _ = images.shape
        grid = h // self.patch, w // self.patch
        if (grid[0] * self.patch, grid[1] * self.patch) != (h, w):
            raise ValueError(f"image size {(h, w)} must be a multiple of the patch {self.patch}")
        encoder_table, decoder_table = self._position_tables(grid)
        pixels = patches.patchify(images, self.patch)  # [b, n, p * p * 3]
        n = pixels.shape[1]
        visible = jnp.arange(n)[None]
        table = jnp.broadcast_to(encoder_table[None, 1:], (b, n, self.width))
        if noise is not None:
            kept = masking.kept_tokens(n, mask_ratio)
            ids_shuffle, ids_restore = masking.shuffle(noise)
            # Dropped patches leave before the embedding: they cost nothing and cannot leak.
            visible = ids_shuffle[:, :kept]
            pixels = masking.take_tokens(pixels, visible)
            table = masking.take_tokens(table, visible)
        token_init = nn.initializers.normal(0.02)
        tokens = self._embed(pixels) + table.astype(self.dtype)  # [b, k, d]
        cls_token = self.param("cls_token", token_init, (1, 1, self.width))
        first = jnp.broadcast_to(cls_token + encoder_table[0], (b, 1, self.width))
        tokens = jnp.concatenate([first.astype(self.dtype), tokens], axis=1)
        latent = self._encode(tokens, attention.Tokens(visible, penalty, sample, grid))
        mask_token = self.param("mask_token", token_init, (1, 1, self.width))
        x = latent[:, 1:]
        if noise is not None:
            masked = jnp.broadcast_to(mask_token, (b, n - kept, self.width)).astype(self.dtype)
            x = masking.take_tokens(jnp.concatenate([x, masked], axis=1), ids_restore)
        x = x + decoder_table[None, 1:].astype(self.dtype)
        features = fpn.SimpleFPN(self.channels, self.dtype, name="fpn")(
            x.reshape(b, *grid, self.width)
        )
        return {**features, "latent": latent}

    def _encode(self, x: jax.Array, tokens: attention.Tokens) -> jax.Array:
        """Tokens [b, 1 + k, d], class token first, to the latent ones."""
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
        """The encoder's resized 14x14 table and the decoder's own one, both [1 + n, d]."""
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

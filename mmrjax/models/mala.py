"""The two small networks of MALA (IEEE Access 2023): PLPM, which tells painted images, and TBM.

PLPM is the pseudo label prediction module of stage 1, TBM the token balance module of stage 2. The
autoencoder between them is models/mae.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import norm, patches, vit

SLOPE = 0.2  # of the leaky ReLU
NORMAL = nn.initializers.normal(0.02)


def around_one(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
    """Initial scales of a batch norm, normal around 1 with deviation 0.02."""
    return 1 + NORMAL(key, shape, dtype)


class PseudoLabels(nn.Module):
    """PLPM: one logit for an image, high if the image looks painted (label 1), low if original.

    Four convolutions of stride 2 and one of stride 1, all 4 x 4 with padding 1; the mean of the
    last map is the logit. The middle three have a batch norm in place of a bias.

    Attributes:
      base: channels after the first convolution.
      dtype: compute dtype of the convolutions; parameters and statistics are float32.

    Collections: `params`; `batch_stats`, running statistics, which nothing reads.
    """

    base: int = 64
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """RGB [b, h, w, 3] in [-1, 1], all originals or all painted -> logits, float32 [b].

        Batch statistics are always those of `images`: a batch of both would tell by them.
        """
        x = images.astype(self.dtype)
        for i in range(4):
            x = self._convolve(x, self.base << i, 2, use_bias=i == 0, name=f"conv{i}")
            if i:
                x = nn.BatchNorm(
                    use_running_average=False,
                    momentum=0.9,
                    epsilon=1e-5,
                    scale_init=around_one,
                    name=f"norm{i}",
                )(x)
            x = nn.leaky_relu(x, SLOPE).astype(self.dtype)
        x = self._convolve(x, 1, 1, use_bias=True, name="conv4")
        return x.astype(jnp.float32).mean(axis=(1, 2, 3))

    def _convolve(self, x, channels: int, stride: int, use_bias: bool, name: str) -> jax.Array:
        return nn.Conv(
            channels,
            (4, 4),
            stride,
            padding=1,
            use_bias=use_bias,
            dtype=self.dtype,
            kernel_init=NORMAL,
            name=name,
        )(x)


class TokenBalance(nn.Module):
    """TBM (Eq. 5): both ends of the encoder and the decoder's tokens become a map of two channels.

    Attributes:
      width: length of a balanced token.
      form: "linear", nothing between the two projections; "gelu", GELU and a norm between them;
        "none", the decoder's tokens alone (the ablation without TBM).
      patch: patch side p in px.
      dtype: compute dtype; parameters stay float32.
    """

    width: int
    form: str = "linear"
    patch: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, first: jax.Array, last: jax.Array, decoded: jax.Array, grid: tuple[int, int]
    ) -> jax.Array:
        """Logits of "defective" (channel 0) and "normal" (channel 1), float32 [b, h, w, 2].

        Args:
          first: [b, n, d] after the encoder's first block, no class token.
          last: [b, n, d] after the encoder, no class token.
          decoded: [b, n, e] after the decoder.
          grid: patches per column and per row.
        """
        x = decoded
        if self.form != "none":
            u = self._project(self.width, "balance")(jnp.concatenate([first, last], axis=-1))
            if self.form == "gelu":
                u = norm.layer_norm(self.dtype, "norm")(norm.gelu(u))
            x = jnp.concatenate([u, decoded], axis=-1)  # [b, n, width + e]
        x = self._project(2 * self.patch**2, "map")(x)
        return patches.unpatchify(x.astype(jnp.float32), grid, self.patch)

    def _project(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, kernel_init=vit.xavier, name=name)

"""The two trained networks of AMI-Net (IEEE TASE 2024).

The aggregation network finds cluster centres, from which the patches to hide follow; the inpainting
network predicts all patches from the visible ones. Both see the patches of a teacher's feature map
as tokens, each through a projection of its own. If paper and official code (luow23/AMI-Net, MIT)
differ, this module follows the code.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import fpn, positions, vit

EPSILON = 1e-5  # of every LayerNorm: torch's default, not MAE's


class AMINet(nn.Module):
    """Cluster centres of an image's own feature patches, and patches inpainted from visible ones.

    Attributes:
      grid: patches per column and per row; n is their product.
      patch_entries: length of a patch vector, side * side * channels of the feature map.
      width: token dimension d.
      heads: attention heads.
      depth: blocks of the inpainting network (the paper's N_i).
      cluster_depth: blocks of the aggregation network (N_s).
      clusters: cluster tokens, each of which becomes a centre (P).
      train_mask_token: whether the mask token, 0 at first, is trained or stays 0.
      jitter: scale of the noise on tokens in training.
      unroll: blocks of the inpainting network per scan iteration.
      dtype: compute dtype; parameters stay float32.
    """

    grid: tuple[int, int]
    patch_entries: int
    width: int
    heads: int
    depth: int
    cluster_depth: int = 1
    clusters: int = 8
    train_mask_token: bool = True
    jitter: float = 20.0
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """A projection, an encoder and tokens for each network, and the head."""
        bound = self.patch_entries**-0.5  # torch's default for a convolution
        self.embed = self._embedding(vit.xavier)
        self.cluster_embed = self._embedding(fpn.uniform(bound))
        self.inpainter = self._encoder(self.depth, self.unroll)
        self.aggregator = self._encoder(self.cluster_depth, 1)
        self.head = nn.Dense(self.patch_entries, dtype=self.dtype, kernel_init=vit.xavier)
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        self.cluster_tokens = self.param("cluster_tokens", normal, (self.clusters, self.width))
        if self.train_mask_token:
            self.mask_token = self.param("mask_token", zeros, (self.width,))
        else:
            self.mask_token = jnp.zeros(self.width)
        # The column's code comes first. There is no class token, so its row is cut off.
        self.table = jnp.asarray(positions.sincos_2d(self.width, self.grid)[1:])  # [n, d]

    def _embedding(self, kernel_init) -> nn.Dense:
        """A patch convolution as a matrix product: [b, n, patch_entries] -> [b, n, d]."""
        bias_init = fpn.uniform(self.patch_entries**-0.5)
        return nn.Dense(self.width, dtype=self.dtype, kernel_init=kernel_init, bias_init=bias_init)

    def _encoder(self, depth: int, unroll: int) -> vit.Encoder:
        return vit.Encoder(depth, self.heads, epsilon=EPSILON, unroll=unroll, dtype=self.dtype)

    def __call__(
        self,
        patches: jax.Array,
        visible: jax.Array,
        noise: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Runs `cluster` and `inpaint`.

        Args:
          patches: float [b, n, patch_entries].
          visible: bool [b, n].
          noise: (noise of `cluster`, noise of `inpaint`), in training only.

        Returns:
          (tokens, centres, predicted patches), see `cluster` and `inpaint`.
        """
        noise_cluster, noise_inpaint = noise or (None, None)
        tokens, centres = self.cluster(patches, noise_cluster)
        return tokens, centres, self.inpaint(patches, visible, noise_inpaint)

    def cluster(
        self, patches: jax.Array, noise: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The tokens and cluster centres of an image's patches (section III-D, Eqs. 10 and 11).

        Args:
          patches: float [b, n, patch_entries].
          noise: standard normal [b, n, d], in training only.

        Returns:
          (tokens with their positions, before aggregation and without noise, float32 [b, n, d];
          centres, float32 [b, clusters, d]).
        """
        tokens = self.cluster_embed(patches).astype(jnp.float32)  # [b, n, d]
        x = tokens if noise is None else jitter(tokens, noise, self.jitter)
        first = jnp.broadcast_to(self.cluster_tokens, (len(x), self.clusters, self.width))
        x = jnp.concatenate([first, x + self.table], axis=1)  # [b, clusters + n, d]
        centres = self.aggregator(x.astype(self.dtype))[:, : self.clusters]
        return tokens + self.table, centres.astype(jnp.float32)

    def inpaint(
        self, patches: jax.Array, visible: jax.Array, noise: jax.Array | None = None
    ) -> jax.Array:
        """Predicts all patches from the visible ones (Eqs. 2 to 6).

        Args:
          patches: float [b, n, patch_entries].
          visible: bool [b, n]; the mask token replaces the other patches.
          noise: standard normal [b, n, d], in training only.

        Returns:
          float32 [b, n, patch_entries].
        """
        # The mask token comes before the jitter and before the position.
        x = jnp.where(visible[..., None], self.embed(patches).astype(jnp.float32), self.mask_token)
        x = x if noise is None else jitter(x, noise, self.jitter)  # [b, n, d]
        x = self.inpainter((x + self.table).astype(self.dtype))
        return self.head(x).astype(jnp.float32)


def safe_norm(x: jax.Array) -> jax.Array:
    """Euclidean length over the last axis, [..., d] -> [...]; gradient 0 at 0, as in torch."""
    squared = jnp.sum(x**2, axis=-1)
    is_long = squared > 0
    return jnp.where(is_long, jnp.sqrt(jnp.where(is_long, squared, 1.0)), 0.0)


def jitter(tokens: jax.Array, noise: jax.Array, scale: float) -> jax.Array:
    """Adds noise in proportion to each token's length (feature jittering, arXiv 2206.03687).

    A token of length 0, as the mask token is at first, gets none. The length takes part in the
    gradient, as in the official code.

    Args:
      tokens: float32 [b, n, d].
      noise: standard normal [b, n, d].
      scale: factor of the noise; 20 in UniAD and in AMI-Net.

    Returns:
      float32 [b, n, d].
    """
    return tokens + noise * (safe_norm(tokens)[..., None] / tokens.shape[-1] * scale)

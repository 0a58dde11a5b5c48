"""Vision transformer encoder over an arbitrary set of tokens (Dosovitskiy et al. 2021).

Blocks normalise first and use the exact GELU. The default epsilon of a norm is 1e-6, as in MAE's
ViT, whose weights MMR starts from. The parameters of all blocks are stacked ([depth, ...] leaves)
and the blocks run under a scan, so that compile time does not grow with depth; `unroll` trades
compile time for fewer kernel boundaries.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import attention, norm

xavier = nn.initializers.xavier_uniform()


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32.

    Attributes:
      heads: attention heads, a divisor of the width.
      dtype: compute dtype.
      hybrid: patches that each head sees (MMR+); None: all.
      kernel: attention without `hybrid` by "xla", or by "cudnn", NVIDIA's flash attention.
    """

    heads: int
    dtype: jnp.dtype
    hybrid: attention.Hybrid | None = None
    kernel: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        tokens: attention.Tokens | None = None,
        layer: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """Runs the attention of one layer.

        Args:
          x: [b, n, d] of `dtype`.
          tokens: with `hybrid`, which patches the tokens are.
          layer: with `hybrid`, (number of the layer from 0, int [heads] kinds of its heads).

        Returns:
          [b, n, d] of `dtype`.
        """
        b, n, d = x.shape
        qkv = nn.Dense(3 * d, dtype=self.dtype, kernel_init=xavier, name="qkv")(x)  # [b, n, 3 d]
        qkv = qkv.reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # each [b, n, heads, d / heads]
        if tokens is None:
            x = attention.softmax_attention(q, k, v, kernel=self.kernel).reshape(b, n, d)
        else:
            self.sow("intermediates", "queries_keys", (q, k))  # stored only if a caller asks
            x = attention.attend(q, k, v, self.hybrid, tokens, *layer).reshape(b, n, d)
        return nn.Dense(d, dtype=self.dtype, kernel_init=xavier, name="proj")(x)  # [b, n, d]


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    heads: int
    mlp_ratio: int
    epsilon: float
    dtype: jnp.dtype
    hybrid: attention.Hybrid | None = None
    kernel: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, tokens, layer) -> tuple[jax.Array, None]:
        """[b, n, d] -> ([b, n, d], None), the form that a scan expects; see `Attention`."""
        d = x.shape[-1]
        y = norm.layer_norm(self.dtype, "norm1", self.epsilon)(x)
        attend = Attention(self.heads, self.dtype, self.hybrid, self.kernel, name="attn")
        x = x + attend(y, tokens, layer)  # [b, n, d]
        y = norm.layer_norm(self.dtype, "norm2", self.epsilon)(x)
        hidden = self.mlp_ratio * d
        y = nn.Dense(hidden, dtype=self.dtype, kernel_init=xavier, name="fc1")(y)  # [b, n, hidden]
        y = nn.Dense(d, dtype=self.dtype, kernel_init=xavier, name="fc2")(norm.gelu(y))
        return x + y, None


class Encoder(nn.Module):
    """A stack of transformer blocks and the final norm.

    Attributes:
      depth: number of blocks.
      heads: attention heads, a divisor of the width.
      mlp_ratio: hidden width of a block's MLP, in widths.
      epsilon: that of every norm.
      unroll: blocks per iteration of the scan.
      dtype: compute dtype; parameters stay float32.
      hybrid: see `Attention`.
      kernel: see `Attention`.
    """

    depth: int
    heads: int
    mlp_ratio: int = 4
    epsilon: float = norm.EPSILON
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    hybrid: attention.Hybrid | None = None
    kernel: str = "xla"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        tokens: attention.Tokens | None = None,
        kinds: jax.Array | None = None,
    ) -> jax.Array:
        """Runs all blocks and the norm.

        Args:
          x: [b, n, d] of `dtype`; with `hybrid`, class token first.
          tokens: with `hybrid`, which patches the other tokens are.
          kinds: with `hybrid`, int [depth, heads], see models/attention.py.

        Returns:
          [b, n, d] of `dtype`.

        Raises:
          ValueError: the heads do not divide the width.
        """
        if x.shape[-1] % self.heads:
            raise ValueError(f"width={x.shape[-1]} must be divisible by heads={self.heads}")
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=self.depth,
            unroll=self.unroll,
        )
        layers = None if tokens is None else (jnp.arange(self.depth), kinds)
        settings = self.heads, self.mlp_ratio, self.epsilon, self.dtype, self.hybrid, self.kernel
        stack = blocks(*settings, name="blocks")
        x, _ = stack(x, tokens, layers)  # [b, n, d]
        return norm.layer_norm(self.dtype, "norm", self.epsilon)(x)

"""Vision transformer encoder over an arbitrary set of tokens (Dosovitskiy et al. 2021).

Pre-norm blocks with exact GELU and, by default, LayerNorm epsilon 1e-6, as in MAE's ViT, which MMR
starts from.
The blocks share one stacked parameter layout ([depth, ...] leaves) and run under a scan, so that
compile time does not grow with depth; `unroll` trades that for fewer kernel boundaries.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmrjax.models import attention

xavier = nn.initializers.xavier_uniform()


EPSILON = 1e-6  # of MAE's and ViTDet's norms; torch's own default is 1e-5


def layer_norm(dtype: jnp.dtype, name: str, epsilon: float = EPSILON) -> nn.Module:
    """LayerNorm over the last axis, statistics in float32; in float32 torch's two-pass variance.

    In bfloat16, as GELU is there too, it can be differentiated in reverse mode alone.
    """
    if dtype == jnp.bfloat16:
        return LayerNorm(epsilon=epsilon, name=name)
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


# Numbers from which on the statistics are a kernel of their own, as they always are in training:
# XLA would compute them again in every kernel that reads them, row by row, and on an H200 those ran
# at a third of the memory's speed. Not measured on other platforms.
SEPARATE = 2**22


class LayerNorm(nn.Module):
    """nn.LayerNorm of and to bfloat16, with its own gradient; parameters `scale` and `bias` [c]."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., c] to bfloat16 [..., c]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _normalise(x.astype(jnp.bfloat16), scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    mean, inverse = _statistics(x, epsilon)
    if isinstance(x.size, int) and x.size >= SEPARATE:  # not of an export's unknown batch
        mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    return ((x - mean) * inverse * scale + bias).astype(x.dtype)


def _statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Mean and 1 / deviation, float32 [..., 1]: both sums in one pass."""
    x = x.astype(jnp.float32)
    mean, square = (y.mean(axis=-1, keepdims=True) for y in (x, x * x))
    # Of bfloat16 numbers: their squares' mean is 2e-7 off, so the variance is, for means up to
    # thirty deviations, as good as the numbers themselves.
    return mean, jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + epsilon)


def _normalise_forward(x, scale, bias, epsilon):
    mean, inverse = jax.lax.optimization_barrier(_statistics(x, epsilon))
    y = ((x - mean) * inverse * scale + bias).astype(x.dtype)
    return y, (x, mean, inverse, scale)


def _normalise_backward(epsilon, kept, slope):
    x, mean, inverse, scale = kept
    # A kernel that sums over the rows and writes all their numbers, too, took 25 us on an H200,
    # where two had taken 8. So XLA must not make `slope` in one that sums, nor slope * standard.
    slope = jax.lax.optimization_barrier(slope)
    alone = jax.lax.optimization_barrier(slope)
    slope = slope.astype(jnp.float32)
    standard = (x - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    to_standard = slope * scale
    common = to_standard.mean(axis=-1, keepdims=True)
    along = (to_standard * standard).mean(axis=-1, keepdims=True)
    to_x = inverse * (to_standard - common - standard * along)
    return to_x.astype(x.dtype), (slope * standard).sum(rows), alone.sum(rows, jnp.float32)


_normalise.defvjp(_normalise_forward, _normalise_backward)


# (Phi(x) - 1/2) / x in powers of x², Phi the normal distribution: minimax on |x| <= PHI_END, where
# times x it is 1/2.
PHI = (
    *(3.98912192e-01, -6.63610741e-02, 9.83017138e-03, -1.11413319e-03, 9.45700904e-05),
    *(-5.76024434e-06, 2.34333398e-07, -5.63217644e-09, 5.99650946e-11),
)
PHI_END = 4.2


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; JAX's default is the tanh approximation.

    Written with erf: jax.nn.gelu uses erfc, which costs XLA:CPU an exponential and two branches.
    In bfloat16 by a polynomial, 7e-5 from it at most for x >= -50: with erf a GPU took twice as
    long as it needs to read and write the numbers.
    """
    if x.dtype == jnp.bfloat16:
        return _gelu_of_bfloat16(x)
    return x * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5)))


@jax.custom_vjp
def _gelu_of_bfloat16(x: jax.Array) -> jax.Array:
    exact = x.astype(jnp.float32)
    return (exact * _phi(exact)).astype(x.dtype)


def _gelu_backward(x: jax.Array, slope: jax.Array) -> tuple[jax.Array]:
    # Hidden, or XLA takes _phi for the one of the forward pass and keeps it, four bytes a number.
    exact = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * exact * exact) * (2 * jnp.pi) ** -0.5
    own = _phi(exact) + exact * density
    to_x = (own * slope.astype(jnp.float32)).astype(x.dtype)
    return (jax.lax.optimization_barrier(to_x),)  # as in _normalise_backward; a bias sums it


_gelu_of_bfloat16.defvjp(lambda x: (_gelu_of_bfloat16(x), x), _gelu_backward)


def _phi(x: jax.Array) -> jax.Array:
    x = jnp.clip(x, -PHI_END, PHI_END)
    square = x * x
    factor = jnp.full_like(x, PHI[-1])
    for coefficient in PHI[-2::-1]:
        factor = factor * square + coefficient
    return 0.5 + x * factor


class Attention(nn.Module):
    """Multi-head self-attention; softmax in float32.

    `kernel` is "xla" or "cudnn", whose flash attention serves plain attention on NVIDIA GPUs.
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
        """[b, n, d] -> [b, n, d]; `layer`: its number and the kinds of its heads."""
        b, n, d = x.shape
        qkv = nn.Dense(3 * d, dtype=self.dtype, kernel_init=xavier, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, d // self.heads), 2, 0)
        if tokens is None:
            x = attention.softmax_attention(q, k, v, kernel=self.kernel).reshape(b, n, d)
        else:
            self.sow("intermediates", "queries_keys", (q, k))  # kept only for whoever asks
            x = attention.attend(q, k, v, self.hybrid, tokens, *layer).reshape(b, n, d)
        return nn.Dense(d, dtype=self.dtype, kernel_init=xavier, name="proj")(x)


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
        """[b, n, d] -> [b, n, d], in the form that a scan wants."""
        d = x.shape[-1]
        y = layer_norm(self.dtype, "norm1", self.epsilon)(x)
        attend = Attention(self.heads, self.dtype, self.hybrid, self.kernel, name="attn")
        x = x + attend(y, tokens, layer)
        y = layer_norm(self.dtype, "norm2", self.epsilon)(x)
        y = nn.Dense(self.mlp_ratio * d, dtype=self.dtype, kernel_init=xavier, name="fc1")(y)
        y = nn.Dense(d, dtype=self.dtype, kernel_init=xavier, name="fc2")(gelu(y))
        return x + y, None


class Encoder(nn.Module):
    """A stack of transformer blocks and the final norm; tokens [b, n, d] to [b, n, d]."""

    depth: int
    heads: int
    mlp_ratio: int = 4
    epsilon: float = EPSILON
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
        """[b, n, d] -> [b, n, d].

        Args:
          x: tokens; with `hybrid`, class token first.
          tokens: with `hybrid`, which patches the others are.
          kinds: with `hybrid`, int [depth, heads], see models/attention.py.
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
        x, _ = stack(x, tokens, layers)
        return layer_norm(self.dtype, "norm", self.epsilon)(x)

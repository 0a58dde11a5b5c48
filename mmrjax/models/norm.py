"""LayerNorm and GELU with gradients of their own for bfloat16.

In float32 both are the usual formulas. In bfloat16 a GPU spends most of their time on reading and
writing memory, so both are written such that XLA neither stores float32 copies of activations nor
computes a result twice. Both bfloat16 forms can be differentiated in reverse mode only.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-6  # of the norms of MAE and ViTDet; torch's default is 1e-5

# An array of at least so many elements gets its statistics from a kernel of their own. XLA would
# otherwise compute the statistics again, row by row, in every kernel that reads them; on an H200
# those kernels reached a third of the memory's speed. Not measured on other platforms.
SEPARATE_STATISTICS_FROM = 2**22


def layer_norm(dtype: jnp.dtype, name: str | None, epsilon: float = EPSILON) -> nn.Module:
    """LayerNorm over the last axis; its statistics are float32.

    In float32 the variance is computed in two passes, as torch does.

    Args:
      dtype: type of input and output, float32 or bfloat16.
      name: name of the module.
      epsilon: added to the variance.
    """
    if dtype == jnp.bfloat16:
        return LayerNorm(epsilon=epsilon, name=name)
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class LayerNorm(nn.Module):
    """nn.LayerNorm in bfloat16 with a gradient of its own; parameters `scale` and `bias` [c]."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., c] of any float type -> bfloat16 [..., c]."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return _normalise(x.astype(jnp.bfloat16), scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    mean, inverse = _statistics(x, epsilon)
    size = x.size  # a symbol if the batch is unknown, as in an export
    if isinstance(size, int) and size >= SEPARATE_STATISTICS_FROM:
        mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    return ((x - mean) * inverse * scale + bias).astype(x.dtype)


def _statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(mean, 1 / standard deviation), float32 [..., 1], both sums in one pass.

    The mean of bfloat16 squares is off by 2e-7. For means up to thirty standard deviations the
    variance is therefore as exact as the input.
    """
    x = x.astype(jnp.float32)
    mean, square = (y.mean(axis=-1, keepdims=True) for y in (x, x * x))
    return mean, jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0) + epsilon)


def _normalise_forward(x, scale, bias, epsilon):
    mean, inverse = jax.lax.optimization_barrier(_statistics(x, epsilon))
    y = ((x - mean) * inverse * scale + bias).astype(x.dtype)
    return y, (x, mean, inverse, scale)


def _normalise_backward(epsilon, saved, gradient):
    x, mean, inverse, scale = saved
    # One kernel that writes every element and sums over the rows took 25 us on an H200; two kernels
    # took 8 us. The barriers keep XLA from producing `gradient`, or gradient * standard, in a
    # kernel that sums.
    gradient = jax.lax.optimization_barrier(gradient)
    summed_alone = jax.lax.optimization_barrier(gradient)
    gradient = gradient.astype(jnp.float32)
    standard = (x - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    to_standard = gradient * scale
    common = to_standard.mean(axis=-1, keepdims=True)
    along = (to_standard * standard).mean(axis=-1, keepdims=True)
    to_x = (inverse * (to_standard - common - standard * along)).astype(x.dtype)
    return to_x, (gradient * standard).sum(rows), summed_alone.sum(rows, jnp.float32)


_normalise.defvjp(_normalise_forward, _normalise_backward)


# Coefficients, in powers of x^2, of (Phi(x) - 1/2) / x, with Phi the normal distribution function:
# the minimax polynomial for |x| <= PHI_END. At PHI_END, x times the polynomial is 1/2.
PHI = (
    *(3.98912192e-01, -6.63610741e-02, 9.83017138e-03, -1.11413319e-03, 9.45700904e-05),
    *(-5.76024434e-06, 2.34333398e-07, -5.63217644e-09, 5.99650946e-11),
)
PHI_END = 4.2


def gelu(x: jax.Array) -> jax.Array:
    """The exact (erf) GELU; JAX's default is the tanh approximation.

    float32 uses erf: jax.nn.gelu uses erfc, which costs XLA:CPU an exponential and two branches.
    bfloat16 uses a polynomial that differs from the GELU by at most 7e-5 for x >= -50: with erf a
    GPU took twice as long as reading and writing the array needs.

    Args:
      x: [...], float32 or bfloat16.

    Returns:
      [...], the type of `x`.
    """
    if x.dtype == jnp.bfloat16:
        return _gelu_of_bfloat16(x)
    return x * (0.5 * (1 + jax.lax.erf(x * 0.5**0.5)))


@jax.custom_vjp
def _gelu_of_bfloat16(x: jax.Array) -> jax.Array:
    exact = x.astype(jnp.float32)
    return (exact * _phi(exact)).astype(x.dtype)


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    # The barrier stops XLA from sharing _phi with the forward pass: it would keep a float32 copy of
    # every activation.
    exact = jax.lax.optimization_barrier(x).astype(jnp.float32)
    density = jnp.exp(-0.5 * exact * exact) * (2 * jnp.pi) ** -0.5
    derivative = _phi(exact) + exact * density
    to_x = (derivative * gradient.astype(jnp.float32)).astype(x.dtype)
    # The gradient of a bias sums `to_x`: a kernel of its own, as in _normalise_backward.
    return (jax.lax.optimization_barrier(to_x),)


_gelu_of_bfloat16.defvjp(lambda x: (_gelu_of_bfloat16(x), x), _gelu_backward)


def _phi(x: jax.Array) -> jax.Array:
    """The normal distribution function by the polynomial PHI; float32 of any shape."""
    x = jnp.clip(x, -PHI_END, PHI_END)
    square = x * x
    factor = jnp.full_like(x, PHI[-1])
    for coefficient in PHI[-2::-1]:
        factor = factor * square + coefficient
    return 0.5 + x * factor

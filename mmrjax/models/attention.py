"""Hybrid attention of MMR+: local heads see a window of the image, global heads a sparse lattice.

The proposal (papers/mmr_plus_proposal) names "local attention (3x3 window)" and "global attention
(sparse sampling)" and no more. A window counts patches, since 3 x 3 px lie within a patch. Heads
differ only in the keys that a query may see; there are no new parameters. Windows and lattices lie
on the grid of the whole image, not on the shortened sequence of visible tokens. Every query sees
itself and the class token, so no row is empty; the class token sees everything.

Called by `vit.Attention`. Public JAX code for two-dimensional neighbourhoods was not found.

Shapes: b batch, n patches of the whole image, k kept patches, c channels of a head.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

FULL, LOCAL, GLOBAL = 0, 1, 2  # kinds of heads
HARD = 1e9  # subtracted from a logit, it leaves a weight of exactly 0 in float32
LOGITS_AT_A_TIME = 1 << 20  # of one image: 4 MiB


@dataclasses.dataclass(frozen=True)
class Hybrid:
    """The limits of the heads of each layer.

    Attributes:
      kinds: FULL, LOCAL or GLOBAL for every head before any choice by distance, [depth][heads].
      window: side of a local head's window in patches, odd.
      stride: that of the lattice of the global heads, in patches; its phase rotates through stride²
        layers.
      gather: collects the visible keys instead of masking all pairs, for large grids. The result is
        the same. It needs LOCAL and GLOBAL heads only, equally many LOCAL ones in every layer, a
        lattice, and a hard limit.
    """

    kinds: tuple[tuple[int, ...], ...]
    window: int = 3
    stride: int = 2
    gather: bool = False

    @property
    def local_heads(self) -> int:
        """The number of LOCAL heads of the first layer."""
        return self.kinds[0].count(LOCAL)


@flax.struct.dataclass
class Tokens:
    """The patches behind the tokens of a call, without the class token.

    Attributes:
      ids: int [b or 1, k], row-major numbers on the image's grid.
      penalty: float32 scalar >= 0, subtracted from the logits of pairs that are not allowed.
      sample: bool [b or 1, n], the keys of global heads among all n patches; None for the lattice.
      grid: patches per column and per row of the whole image.
    """

    ids: jax.Array
    penalty: jax.Array | float
    sample: jax.Array | None
    grid: tuple[int, int] = flax.struct.field(pytree_node=False)


def fixed_kinds(
    depth: int, heads: int, local: int, layers: str = "all", far: int = GLOBAL
) -> tuple[tuple[int, ...], ...]:
    """Kinds of all heads, [depth][heads].

    Args:
      depth: number of layers.
      heads: heads of a layer.
      local: in a hybrid layer the first `local` heads are LOCAL.
      layers: hybrid layers: "all", "last_half" or "alternate" (the second, the fourth, …). The
        heads of the other layers are FULL.
      far: kind of the other heads of a hybrid layer.
    """
    chosen = {
        "all": range(depth),
        "last_half": range(depth // 2, depth),
        "alternate": range(1, depth, 2),
    }[layers]
    hybrid, plain = (LOCAL,) * local + (far,) * (heads - local), (FULL,) * heads
    return tuple(hybrid if layer in chosen else plain for layer in range(depth))


def local_pairs(ids: jax.Array, grid: tuple[int, int], window: int) -> jax.Array:
    """Whether one patch lies in the window around another, clipped at borders.

    Args:
      ids: int [b, k], row-major numbers of patches.
      grid: patches per column and per row.
      window: side of a window in patches, odd.

    Returns:
      bool [b, k, k]; every patch lies in its own window.
    """

    def near(x: jax.Array) -> jax.Array:
        return jnp.abs(x[:, :, None] - x[:, None, :]) <= window // 2

    row, column = jnp.divmod(ids, grid[1])
    return near(row) & near(column)


def on_lattice(
    ids: jax.Array, grid: tuple[int, int], stride: int, layer: jax.Array | int
) -> jax.Array:
    """Whether each patch is on the lattice of a layer (from 0); int [...] -> bool [...]."""
    row, column = jnp.divmod(ids, grid[1])
    return ((row - layer) % stride == 0) & ((column - layer // stride) % stride == 0)


def allowed_pairs(
    hybrid: Hybrid, tokens: Tokens, layer: jax.Array | int, kinds: jax.Array
) -> jax.Array:
    """Which query may see which key, class token first: bool [b or 1, heads, 1 + k, 1 + k].

    Args:
      hybrid: window and stride.
      tokens: k patches.
      layer: number of the layer, from 0.
      kinds: int [heads], of this layer.
    """
    if tokens.sample is None:
        keys = on_lattice(tokens.ids, tokens.grid, hybrid.stride, layer)  # [b, k]
    else:
        keys = jnp.take_along_axis(tokens.sample, tokens.ids, axis=1)  # [b, k]
    local = local_pairs(tokens.ids, tokens.grid, hybrid.window)  # [b, k, k]
    sparse = keys[:, None, :] | jnp.eye(keys.shape[1], dtype=bool)  # [b, k, k]
    kind = kinds[:, None, None]
    pairs = (kind == FULL) | jnp.where(kind == LOCAL, local[:, None], sparse[:, None])
    return jnp.pad(pairs, ((0, 0), (0, 0), (1, 0), (1, 0)), constant_values=True)


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, kernel: str = "xla"
) -> jax.Array:
    """softmax(q k^T / sqrt(c) + bias) v, softmax in float32.

    In float32 the division by the sums of the exponentials follows the product with v: it divides c
    numbers of a row instead of n. XLA:CPU takes half the time of jax.nn.dot_product_attention.

    Args:
      q: [b, m, heads, c], float32 or bfloat16.
      k: [b, n, heads, c].
      v: [b, n, heads, c].
      bias: float, broadcasts to [b, heads, m, n]; or None.
      kernel: for bfloat16, "xla", or "cudnn" on an NVIDIA GPU.

    Returns:
      [b, m, heads, c], the type of `q`.
    """
    if q.dtype != jnp.float32:
        return jax.nn.dot_product_attention(q, k, v, bias, implementation=kernel)
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))  # [b, heads, …, c]
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k)  # [b, heads, m, n]
    if bias is not None:
        logits = logits + bias
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v) / weights.sum(-1, keepdims=True)
    return mixed.swapaxes(1, 2)


def attention_by_rows(q: jax.Array, k: jax.Array, v: jax.Array, kernel: str = "xla") -> jax.Array:
    """`softmax_attention` of many queries, some rows at a time: memory grows with n, not with n².

    Arguments and result as of `softmax_attention`, without a bias.
    """
    b, m, heads, c = q.shape
    parts = -(-m * heads * k.shape[1] // LOGITS_AT_A_TIME)
    if parts == 1:
        return softmax_attention(q, k, v, kernel=kernel)
    rows = -(-m // parts)
    q = jnp.pad(q, ((0, 0), (0, parts * rows - m), (0, 0), (0, 0)))
    q = jnp.moveaxis(q.reshape(b, parts, rows, heads, c), 1, 0)
    mixed = jax.lax.map(lambda q: softmax_attention(q, k, v, kernel=kernel), q)
    return jnp.moveaxis(mixed, 0, 1).reshape(b, parts * rows, heads, c)[:, :m]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    hybrid: Hybrid,
    tokens: Tokens,
    layer: jax.Array | int,
    kinds: jax.Array,
) -> jax.Array:
    """Attention of one layer; softmax in float32.

    Args:
      q: queries [b, 1 + k, heads, c], class token first.
      k: keys, the same shape.
      v: values, the same shape.
      hybrid: the limits of the heads.
      tokens: k patches.
      layer: number of the layer, from 0.
      kinds: int [heads], of this layer.

    Returns:
      [b, 1 + k, heads, c].
    """
    if not hybrid.gather:
        allowed = allowed_pairs(hybrid, tokens, layer, kinds)  # [b or 1, heads, 1 + k, 1 + k]
        bias = jnp.where(allowed, 0.0, -jnp.asarray(tokens.penalty, jnp.float32))
        return softmax_attention(q, k, v, bias)
    order = jnp.argsort(kinds)  # [heads], LOCAL before GLOBAL
    ordered = [x[:, :, order] for x in (q, k, v)]
    split = hybrid.local_heads
    local = _gathered_local(*(x[:, :, :split] for x in ordered), hybrid, tokens)
    sparse = _gathered_global(*(x[:, :, split:] for x in ordered), hybrid, tokens, layer)
    patches = jnp.concatenate([local, sparse], axis=2)  # [b, k, heads, c]
    patches = patches[:, :, jnp.argsort(order)]
    return jnp.concatenate([softmax_attention(q[:, :1], k, v), patches], axis=1)


def _slots(tokens: Tokens) -> jax.Array:
    """The place of each patch in the sequence, int [b or 1, n + 1]; -1: dropped or no patch."""
    b, k = tokens.ids.shape
    table = jnp.full((b, tokens.grid[0] * tokens.grid[1] + 1), -1)
    return table.at[jnp.arange(b)[:, None], tokens.ids].set(jnp.arange(1, k + 1))


def _gathered_local(q, k, v, hybrid: Hybrid, tokens: Tokens) -> jax.Array:
    """Outputs of local heads for the patches, [b, k, heads, c]; window² + 1 keys per query."""
    near = jnp.asarray(_windows(tokens.grid, hybrid.window))[tokens.ids]  # [b, k, window²]
    slots = jax.vmap(lambda table, ids: table[ids])(_slots(tokens), near)
    slots = jnp.pad(slots, ((0, 0), (0, 0), (1, 0)))  # [b, k, s], the class token in slot 0
    slots = jnp.broadcast_to(slots, (q.shape[0], *slots.shape[1:]))
    keys, values = (  # [b, k, s, heads, c]
        jax.vmap(lambda x, s: x[s])(x, jnp.maximum(slots, 0)) for x in (k, v)
    )
    logits = jnp.einsum("bqhc,bqshc->bhqs", q[:, 1:], keys, preferred_element_type=jnp.float32)
    weights = _softmax(logits * q.shape[-1] ** -0.5, (slots >= 0)[:, None])
    return jnp.einsum("bhqs,bqshc->bqhc", weights.astype(v.dtype), values)


def _gathered_global(q, k, v, hybrid: Hybrid, tokens: Tokens, layer) -> jax.Array:
    """Outputs of global heads for the patches, [b, k, heads, c].

    The keys of a query are the lattice, the class token and the query's own patch.
    """
    ids = _lattice_ids(tokens.grid, hybrid.stride, layer)  # [m]
    slots = jnp.pad(_slots(tokens)[:, ids], ((0, 0), (1, 0)))  # [b, 1 + m], class token first
    slots = jnp.broadcast_to(slots, (q.shape[0], slots.shape[1]))
    keys, values = (  # [b, 1 + m, heads, c]
        jax.vmap(lambda x, s: x[s])(x, jnp.maximum(slots, 0)) for x in (k, v)
    )
    q, scale, own_slot = q[:, 1:], q.shape[-1] ** -0.5, jnp.arange(1, q.shape[1])
    logits = jnp.einsum("bqhc,bshc->bhqs", q, keys, preferred_element_type=jnp.float32)
    own = jnp.einsum("bqhc,bqhc->bhq", q, k[:, 1:], preferred_element_type=jnp.float32)
    # The query's own patch is left out of the lattice, since it is added as the last key.
    seen = (slots[:, None] >= 0) & (slots[:, None] != own_slot[:, None])  # [b, k, 1 + m]
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, 1)), constant_values=True)[:, None]
    logits = jnp.concatenate([logits, own[..., None]], axis=-1)  # [b, heads, k, 2 + m]
    weights = _softmax(logits * scale, seen).astype(v.dtype)
    mixed = jnp.einsum("bhqs,bshc->bqhc", weights[..., :-1], values)  # [b, k, heads, c]
    return mixed + jnp.moveaxis(weights[..., -1], 1, 2)[..., None] * v[:, 1:]


def _softmax(logits: jax.Array, seen: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(seen, logits, -HARD), axis=-1)


def _windows(grid: tuple[int, int], window: int) -> np.ndarray:
    """The patches of every patch's window, int [n, window²]; the number n means: no patch."""
    h, w = grid
    row, column = np.indices(grid).reshape(2, -1, 1)
    offset = np.indices((window, window)).reshape(2, 1, -1) - window // 2
    row, column = row + offset[0], column + offset[1]
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return np.where(inside, row * w + column, h * w)


def _lattice_ids(grid: tuple[int, int], stride: int, layer: jax.Array | int) -> jax.Array:
    """The patches on a layer's lattice, int [m], m its largest size; the number n: no patch."""
    h, w = grid
    row = layer % stride + stride * jnp.arange(-(-h // stride))
    column = (layer // stride) % stride + stride * jnp.arange(-(-w // stride))
    inside = (row < h)[:, None] & (column < w)
    return jnp.where(inside, row[:, None] * w + column, h * w).reshape(-1)


def mean_distances(q: jax.Array, k: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The mean attention distance of each head in each image, in patches: float32 [b, heads].

    The mean runs over the attention of patches to patches, without the class token, as in
    Dosovitskiy et al. 2021, figure 7.

    Args:
      q: queries [b, 1 + n, heads, c] of whole images, class token first.
      k: keys, the same shape.
      grid: patches per column and per row, n in all.
    """
    logits = jnp.einsum("bqhc,bshc->bhqs", q[:, 1:], k[:, 1:], preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
    place = np.indices(grid).reshape(2, -1)
    distance = np.hypot(*(place[:, :, None] - place[:, None, :]))  # [n, n]
    total = jnp.einsum("bhqs,qs->bh", weights, jnp.asarray(distance, jnp.float32))
    return total / q[0, 1:].shape[0]


def shortest_local(distances: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Makes the heads of the shortest attention distance LOCAL, in every layer.

    Args:
      distances: float [depth, heads], see `mean_distances`.
      kinds: int [depth, heads], in any order; FULL layers stay as they are.

    Returns:
      int [depth, heads], as many heads of each kind in a layer as before.
    """
    rank = np.argsort(np.argsort(distances, axis=1, kind="stable"), axis=1, kind="stable")
    # LOCAL heads first, then the others, are handed out by rank of distance.
    key = np.where(kinds == LOCAL, 0, 1)
    ordered = np.take_along_axis(kinds, np.argsort(key, axis=1, kind="stable"), axis=1)
    return np.take_along_axis(ordered, rank, axis=1)

"""Counts of anomaly-map pixels per bucket of scores, on device and as integers.

A bucket is the upper half of a float32 score's bits, put in the order of the scores: 2^16 buckets,
128 for every doubling, whatever the range of the maps (what is closer to 0 than 1e-38 counts as 0).
Counts are int32 on device, one batch at a time; sums over batches are the caller's, in int64.
float32 counts would lose units above 2^24.

The only module of the metrics that uses JAX. Called by streaming.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

BUCKETS = 1 << 16
FINITE = range(128, 65408)  # buckets of finite scores; infinity and NaN lie outside
ROWS = 128  # histograms that one call fills


def bucket(scores: jax.Array) -> jax.Array:
    """Number of the bucket that holds each score, int32 in 0..BUCKETS - 1, rising with the score.

    Args:
        scores: float32, any shape; NaN and infinity get buckets outside `FINITE`.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 equals 0.0 and must share its bucket
    bits = jax.lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
    # Negative floats have the sign bit set and grow away from zero: flip the other bits.
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered >> 16) + BUCKETS // 2


@functools.partial(jax.jit, static_argnames=("mesh", "width"))
def count(
    maps: jax.Array, row: jax.Array, mesh: jax.sharding.Mesh, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Histograms of a batch, summed over the devices; only occupied buckets come back.

    Args:
        maps: float32 [b, h, w]; b is divisible by the devices of `mesh`.
        row: int32 [b, h, w]: which of ROWS histograms a pixel is counted in; others (padding, or
            for another call) are left out.
        mesh: with a "data" axis, over which the batch is split.
        width: most buckets that can come back.

    Returns:
        Bucket of each column, int32 [width], ascending, BUCKETS where there are fewer; counts,
        int32 [ROWS, width]; and the number of occupied buckets, which is complete unless it is
        larger than `width`.
    """

    def local(maps, row):
        inside = (row >= 0) & (row < ROWS)
        slot = jnp.where(inside, row * BUCKETS + bucket(maps), ROWS * BUCKETS)
        counts = jnp.zeros(ROWS * BUCKETS, jnp.int32).at[slot.ravel()].add(1, mode="drop")
        counts = counts.reshape(ROWS, BUCKETS)
        occupied = jax.lax.psum((counts > 0).any(axis=0).astype(jnp.int32), "data") > 0
        columns = jnp.flatnonzero(occupied, size=width, fill_value=BUCKETS)
        chosen = counts.at[:, columns].get(mode="fill", fill_value=0)
        return columns, jax.lax.psum(chosen, "data"), occupied.sum()

    if maps.size >= 1 << 31:
        raise ValueError(
            f"a batch of {maps.shape} maps has {maps.size} pixels, too many for int32 counts; "
            "lower eval.batch_size"
        )
    split, whole = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=whole)(maps, row)


def edges() -> np.ndarray:
    """Smallest score of every finite bucket, float32 [len(FINITE)], ascending."""
    ordered = (np.arange(FINITE.start, FINITE.stop, dtype=np.int64) - BUCKETS // 2) << 16
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
    return bits.view(np.float32)

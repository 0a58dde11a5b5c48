"""A memory bank of patches: nearest rows, a greedy coreset, and distances learnt from good parts.

Used by patchcore.py. `whitening`, `expected_distances` and `coreset_of_each` are not in the paper
(arXiv 2106.08265).

A memory is {"bank": float32 [rows, d], "image": int32 [rows], the training image of each row} and,
from options, "whitening" float32 [d, d] and "expected" float32 [rows].
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mmrjax.runtime import logs

SMALL_BANK = 1000  # rows below which `fit` asks for a larger coreset
EXACT = jax.lax.Precision.HIGHEST  # TF32 would change which patches are nearest
CANDIDATES = 1024  # farthest points among which the coreset chooses between two passes over all
BLOCK = 128  # points that it chooses there at most
BANK_ROWS_PER_CHUNK = 4096  # distances to this many bank rows at a time
WHITENING_PATCHES = 16384  # of either half of the training images
SMALLEST_MOMENT = 1e-3  # of a whitened channel, relative to the mean of all


def sample(key: jax.Array, image: int, n: int, kept: int) -> np.ndarray:
    """`kept` of n patches of an image, drawn without replacement."""
    return np.asarray(jax.random.permutation(jax.random.fold_in(key, image), n)[:kept])


def whitening(patches: np.ndarray, shrinkage: float, key: jax.Array) -> np.ndarray:
    """The matrix that weighs a difference of patches by how rare it is among good ones.

    A patch of one half of the images differs from its nearest in the other half, and all of that is
    harmless: light, pose, grain. Squared distances after the matrix are Mahalanobis distances under
    the second moments of these differences, over d: about 1 between good patches. PatchCore has no
    such step; PaDiM (arXiv 2011.08785, section 3.2) has it for the patches of one place.

    Args:
      patches: float32 [images, n, d].
      shrinkage: a number that is added to the diagonal of the differences' correlations; the
        smaller, the more a rare direction counts, and the more data it takes.
      key: PRNG key of the split and of the patches looked at.

    Returns:
      float32 [d, d].

    Raises:
      ValueError: fewer than two images.
    """
    count, n, d = patches.shape
    if count < 2:
        raise ValueError(
            "--config.patchcore.whiten compares training images with each other and needs two or "
            "more, not 1; add images or give 0"
        )
    key_split, key_sample = jax.random.split(key)
    order = np.asarray(jax.random.permutation(key_split, count))
    kept = min(n, -(-WHITENING_PATCHES // (count // 2)))
    rows, queries = (
        np.concatenate([patches[i][sample(key_sample, i, n, kept)] for i in half])
        for half in (order[: -(-count // 2)], order[-(-count // 2) :])
    )
    nearest = [
        np.asarray(_nearest_row(queries[i : i + 2048], rows)[1])
        for i in range(0, len(queries), 2048)
    ]
    left = (queries - rows[np.concatenate(nearest)]).astype(np.float64)
    moments = left.T @ left / len(left)
    scale = np.diag(moments)
    # A channel that good patches never move must not outweigh all others.
    scale = np.maximum(scale, SMALLEST_MOMENT * scale.mean() + np.finfo(np.float32).tiny) ** -0.5
    values, vectors = np.linalg.eigh(moments * scale[:, None] * scale)
    values = np.maximum(values, 0) + shrinkage
    return (scale[:, None] * vectors * (values * d) ** -0.5).astype(np.float32)


def expected_distances(patches: np.ndarray, bank: jax.Array, image: np.ndarray) -> jax.Array:
    """The squared distance of a good patch to its nearest bank row, to be expected by row.

    Some places of a good part vary more than others (a number, a shadow): a distance means less
    there. Each training patch is held against the rows of the other images, as a new image would
    be; a row's value is the mean over the patches nearest to it, or the mean over all where that is
    more: in quiet places, as the corners of a plain background, a little noise must not count for
    much. The paper's own reweighting (section 3.3) looks at the bank alone.

    Args:
      patches: float32 [images, n, d].
      bank: float32 [rows, d].
      image: int [rows], the image that each row comes from.

    Returns:
      float32 [rows], positive.

    Raises:
      ValueError: all rows come from one image.
    """
    if len(set(image.tolist())) < 2:
        raise ValueError(
            "--config.patchcore.relative holds training images against each other and the memory "
            "bank has rows of one only; add images, raise patchcore.coreset or give False"
        )
    total, count = np.zeros(len(bank)), np.zeros(len(bank))
    for i, of_image in enumerate(logs.progress(patches, "expected distances")):
        away = np.where(image == i, np.float32(np.inf), np.float32(0))
        distance, row = (np.asarray(x) for x in _nearest_row(of_image, bank, away))
        np.add.at(total, row, distance)
        np.add.at(count, row, 1)
    mean = total.sum() / count.sum() or 1.0  # all images are equal
    return jnp.asarray(np.maximum(mean, total / np.maximum(count, 1)), jnp.float32)


def distance(memory: dict, patches: jax.Array, away: jax.Array | None = None) -> jax.Array:
    """Distance of patches to the nearest rows of a memory.

    Args:
      memory: see the top of this file.
      patches: float32 [b, h, w, d].
      away: bool [b, images]; the rows of these training images do not count for image b. None: all
        rows count.

    Returns:
      float32 [b, h, w]: squared distances, or with "expected" over those; infinite without a row.
    """
    if "whitening" in memory:
        patches = jnp.matmul(patches, memory["whitening"], precision=EXACT)
    b, h, w, d = patches.shape
    bank, row = memory["bank"], None
    if away is not None:
        far = jnp.where(away[:, memory["image"]], jnp.inf, 0.0)
        search = jax.vmap(lambda own, far: nearest_row(own, bank, far))
        found, row = search(patches.reshape(b, h * w, d), far)
        found, row = found.reshape(-1), row.reshape(-1)
    elif "expected" in memory:
        found, row = nearest_row(patches.reshape(-1, d), bank)
    else:
        found = nearest_squared_distance(patches.reshape(-1, d), bank)
    if "expected" in memory:
        found = found / jnp.asarray(memory["expected"])[row]
    return found.reshape(b, h, w)


def nearest_row(queries, bank, away=0.0) -> tuple[jax.Array, jax.Array]:
    """The nearest bank row of every query: squared distance, float32 [n], and index, int32 [n].

    Args:
      queries: float32 [n, d].
      bank: float32 [m, d].
      away: float32 [m] or a number, added to the squared distances that are compared.
    """
    away = jnp.broadcast_to(away, len(bank))
    best, found = jnp.full(queries.shape[0], jnp.inf), jnp.zeros(queries.shape[0], jnp.int32)
    for start in range(0, len(bank), BANK_ROWS_PER_CHUNK):
        rows = bank[start : start + BANK_ROWS_PER_CHUNK]
        products = jnp.matmul(queries, rows.T, precision=EXACT)
        far = jnp.sum(rows**2, axis=1) + away[start : start + len(rows)] - 2 * products
        nearest = jnp.min(far, axis=1)
        found = jnp.where(nearest < best, jnp.argmin(far, axis=1) + start, found)
        best = jnp.minimum(best, nearest)
    return jnp.maximum(best + jnp.sum(queries**2, axis=1), 0.0), found


_nearest_row = jax.jit(nearest_row)


def nearest_squared_distance(queries: jax.Array, bank: jax.Array) -> jax.Array:
    """The minimum over rows m of |q - m|^2 for every query, [n, d] x [m, d] -> [n], float32."""
    best = jnp.full(queries.shape[0], jnp.inf)  # not len: it may be symbolic in an export
    for start in range(0, len(bank), BANK_ROWS_PER_CHUNK):
        rows = bank[start : start + BANK_ROWS_PER_CHUNK]
        products = jnp.matmul(queries, rows.T, precision=EXACT)
        best = jnp.minimum(best, jnp.min(jnp.sum(rows**2, axis=1) - 2 * products, axis=1))
    return jnp.maximum(best + jnp.sum(queries**2, axis=1), 0.0)


def greedy_coreset(
    patches: jax.Array, rows: int, key: jax.Array, projection: int, start_points: int
) -> jax.Array:
    """Approximate greedy k-centre selection (official code's "approx_greedy_coreset").

    In a random projection, start from the mean distance to a few random points; repeatedly take the
    point farthest from all chosen so far. The start points are not chosen by themselves.

    Args:
      patches: float32 [n, d].
      rows: how many to choose, at most n.
      key: PRNG key.
      projection: width of the projection; d or more means none.
      start_points: number of random starting points.

    Returns:
      int32 [rows], unique.
    """
    key_project, key_start = jax.random.split(key)
    n, d = patches.shape
    if projection < d:
        bound = d**-0.5  # torch's default for a linear layer
        matrix = jax.random.uniform(key_project, (d, projection), minval=-bound, maxval=bound)
        patches = jnp.matmul(patches, matrix, precision=EXACT)
    squares = jnp.sum(patches**2, axis=1)
    start = jax.random.choice(key_start, n, (min(start_points, n),), replace=False)
    distance = jnp.mean(jnp.stack([_distance_to(patches, squares, i) for i in start]), axis=0)
    points, lengths = np.asarray(patches), np.asarray(squares)

    def in_turn(distance: jax.Array) -> Iterator[int]:
        left = rows
        while left:
            block = _farthest_in_turn(points, lengths, np.asarray(distance), min(BLOCK, left))
            yield from block
            left -= len(block)
            # All blocks have one size, so that there is one compilation.
            distance = _nearer(patches, squares, distance, np.resize(block, BLOCK))

    chosen = list(logs.progress(in_turn(distance), "coreset", rows))
    return jnp.asarray(chosen, jnp.int32)


def _farthest_in_turn(
    points: np.ndarray, squares: np.ndarray, distance: np.ndarray, most: int
) -> np.ndarray:
    """The next points of the greedy selection, up to `most`, without a pass over all points.

    Distances only fall. As long as the farthest of the CANDIDATES farthest points is farther than
    all other points were, it is the farthest of all.

    Args:
      points: float32 [n, d].
      squares: float32 [n], their squared lengths.
      distance: float32 [n], to the nearest chosen point; -1 for a chosen point.
      most: at least 1.

    Returns:
      int64 [m], 1 <= m <= most, in the order of choice.
    """
    others, candidates = -np.inf, np.arange(len(points))
    if CANDIDATES < len(points):
        order = np.argpartition(-distance, CANDIDATES)
        others, candidates = distance[order[CANDIDATES]], order[:CANDIDATES]
        # The first of several equal points, as in a selection point by point.
        candidates = np.union1d(candidates, np.argmax(distance))
    own, near, lengths = distance[candidates], points[candidates], squares[candidates]
    block = []
    while len(block) < most:
        i = int(np.argmax(own))
        if block and own[i] <= others:
            break
        block.append(candidates[i])
        squared = lengths - 2 * (near @ near[i]) + lengths[i]
        own = np.minimum(own, np.sqrt(np.maximum(squared, 0)))
        own[i] = -1  # never again, not even among duplicates at distance 0
    return np.array(block)


def warn_of_small(rows: int, patches: int, scale: float = 0) -> None:
    """Warns of a bank with fewer than SMALL_BANK of so many patches; `scale` is named unless 0."""
    if rows >= min(SMALL_BANK, patches):
        return
    logging.warning(
        "the memory bank%s keeps %d of %d patches; of so few images a larger share costs "
        "little and finds more: --config.patchcore.coreset=%.2g in another --workdir",
        f" of scale {scale:g}" if scale else "",
        rows,
        patches,
        min(1.0, SMALL_BANK / patches),
    )


def coreset_of_each(
    patches: jax.Array, images: int, rows: int, key: jax.Array, projection: int
) -> jax.Array:
    """Greedy k-centre selection within every image, which looks at no other image.

    The bank then is a union over images: an image more adds rows and takes none away, and leaving
    an image out is the same as never having had the image. The first row of an image is the patch
    farthest from the image's mean patch.

    Args:
      patches: float32 [images * n, d], image by image.
      images: their number.
      rows: how many of each image, at most n.
      key: PRNG key of the random projection, in which distances are taken.
      projection: width of the projection; d or more means none.

    Returns:
      int32 [images * rows], unique, image by image.
    """
    n, d = len(patches) // images, patches.shape[1]
    matrix = None
    if projection < d:
        key_project, _ = jax.random.split(key)
        matrix = jax.random.uniform(key_project, (d, projection), minval=-1.0, maxval=1.0)
    starts = logs.progress(range(0, len(patches), n), "coreset")
    chosen = [_spread(patches[start : start + n], matrix, rows) + start for start in starts]
    return jnp.concatenate(chosen).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="rows")
def _spread(patches: jax.Array, matrix: jax.Array | None, rows: int) -> jax.Array:
    """`rows` of the patches [n, d] of one image, each the farthest from those before."""
    if matrix is not None:
        patches = jnp.matmul(patches, matrix, precision=EXACT)
    patches = patches - patches.mean(axis=0)
    squares = jnp.sum(patches**2, axis=1)

    def body(distance, _):
        farthest = jnp.argmax(distance)
        products = jnp.matmul(patches, patches[farthest], precision=EXACT)
        new = squares - 2 * products + squares[farthest]
        return jnp.minimum(distance, new).at[farthest].set(-jnp.inf), farthest

    return jax.lax.scan(body, squares, length=rows)[1]


@jax.jit
def _distance_to(points: jax.Array, squares: jax.Array, i: jax.Array) -> jax.Array:
    """Euclidean distance of every point to point i, float32 [n]."""
    products = jnp.matmul(points, points[i], precision=EXACT)
    return jnp.sqrt(jnp.maximum(squares - 2 * products + squares[i], 0.0))


@functools.partial(jax.jit, donate_argnums=2)
def _nearer(points: jax.Array, squares: jax.Array, distance: jax.Array, block) -> jax.Array:
    """The distances [n] once the points `block` [BLOCK] are chosen too; -1 for these."""
    products = jnp.matmul(points, points[block].T, precision=EXACT)
    squared = squares + jnp.min(squares[block] - 2 * products, axis=1)
    distance = jnp.minimum(distance, jnp.sqrt(jnp.maximum(squared, 0.0)))
    return distance.at[block].set(-1.0)

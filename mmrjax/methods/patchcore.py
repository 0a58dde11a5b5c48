"""PatchCore (arXiv 2106.08265): nearest neighbours in a memory bank of teacher patches.

Follows the official code where it differs from the paper: squared distance to the nearest bank row,
no re-weighting. No gradients: the bank is built by `fit` from a greedy coreset. Two options of our
own, off by default: `whitening` and `expected_distances`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mmrjax.methods import anomaly_map, base
from mmrjax.models import resnet
from mmrjax.runtime import logs, mesh

EXACT = jax.lax.Precision.HIGHEST  # TF32 would change which patches are nearest
BANK_ROWS_PER_CHUNK = 4096  # distances to this many bank rows at a time
SMALL_BANK = 1000  # rows below which `fit` asks for a larger coreset
WHITENING_PATCHES = 16384  # of either half of the training images
EXPECTING_PATCHES = 1 << 19  # that tell what distance to expect from a bank row
SMALLEST_MOMENT = 1e-3  # of a whitened channel, relative to the mean of all


class PatchCore(base.Method):
    """Frozen backbone, coreset memory bank, nearest-neighbour distance maps."""

    name = "patchcore"
    fields = ("patchcore.",)
    trains = False
    fits = True

    def __init__(self, config):
        """Builds the backbone tapped at `config.patchcore.layers`."""
        super().__init__(config)
        arch = resnet.architecture(config.teacher.name)
        self.backbone = resnet.ResNet(arch, tuple(config.patchcore.layers), self.dtype)
        self._embed = jax.jit(lambda *x: self.embed(x[0], x[1] / 255.0, x[2]), static_argnums=2)

    @property
    def score_is_peak(self) -> bool:
        """Not for the official code's maximum of raw patches."""
        return self.config.patchcore.score == "smoothed"

    def init(self, key, frozen):
        """Nothing is drawn; the bank comes with `fit`."""
        return {"params": {}}, {}

    def embed(self, frozen: dict, images: jax.Array, scale: float) -> jax.Array:
        """Patch embeddings [b, h, w, d] on the grid of the shallowest layer, float32.

        The teacher sees images `scale` times as large: a small defect fills more of a patch, or a
        patch more of a large one.
        """
        options = self.config.patchcore
        images = _resize(images, scaled(images.shape[1:3], scale, max(options.layers)))
        features = self.backbone.apply(frozen["teacher"], resnet.normalise(images))
        grid = None
        pooled = []
        for layer in sorted(features):
            x = _neighbourhoods(features[layer].astype(jnp.float32), options.patch)
            # Pooling and resizing are both linear and act on different axes: pool first, it is
            # cheaper.
            x = jnp.matmul(x, adaptive_pool_matrix(x.shape[-1], options.width), precision=EXACT)
            grid = grid or x.shape[1:3]
            pooled.append(_resize(x, grid))
        x = jnp.stack(pooled, axis=-2)  # [b, h, w, layers, d]
        # Adaptive pooling of the concatenation to d: the mean over runs of `layers` entries.
        return x.reshape(*x.shape[:3], options.width, len(pooled)).mean(axis=-1)

    def fit(self, variables, frozen, batches, count, key):
        """Fills the bank of every scale with a greedy coreset of the training patches there.

        Raises:
          ValueError: two scales are one, in whole cells; it would count twice.
        """
        scales = by_part(self.config.patchcore.scales)
        size_hw, layer = self.config.data.image_size, max(self.config.patchcore.layers)
        seen = [scaled(size_hw, scale, layer) for scale in scales.values()]
        if len({*seen}) < len(seen):
            raise ValueError(
                f"--config.patchcore.scales={(*scales.values(),)}: of {size_hw[0]} x {size_hw[1]} "
                f"px these are {', '.join(f'{h} x {w}' for h, w in seen)}; two are the same"
            )
        found = {part: self._fit(frozen, batches, count, key, x) for part, x in scales.items()}
        return {**variables, "memory": found["patches"] if len(found) == 1 else found}

    def _fit(self, frozen, batches, count, key, scale: float) -> dict[str, jax.Array]:
        """The memory of one scale, from all patches or from a sample of them."""
        options = self.config.patchcore
        patches, of_image, candidates = self._training_patches(frozen, batches, count, key, scale)
        memory = {}
        if options.whiten:
            own = jax.random.fold_in(key, count)  # images have the numbers below
            memory["whitening"] = matrix = whitening(patches, options.whiten, own)
            for rows in patches:  # in place: there is no room for two
                rows[:] = rows @ matrix
        everything = patches if options.relative else None
        patches = jnp.asarray(patches[:, :candidates].reshape(-1, options.width))
        rows = min(max(1, int(options.coreset * count * of_image)), len(patches))
        if rows < min(SMALL_BANK, len(patches)):
            logging.warning(
                "the memory bank%s keeps %d of %d patches; of so few images a larger share costs "
                "little and finds more: --config.patchcore.coreset=%.2g in another --workdir",
                f" of scale {scale:g}" if len(options.scales) > 1 else "",
                rows,
                len(patches),
                min(1.0, SMALL_BANK / len(patches)),
            )
        chosen = greedy_coreset(
            patches, rows, key, projection=options.projection, start_points=options.start_points
        )
        memory["bank"] = patches[chosen]
        if options.relative:
            image = np.asarray(chosen) // candidates
            memory["expected"] = expected_distances(everything, memory["bank"], image)
        return memory

    def _training_patches(self, frozen, batches, count, key, scale) -> tuple[np.ndarray, int, int]:
        """Patches [count, n, d], of how many in an image, and the first how many are candidates."""
        options = self.config.patchcore
        patches, done, of_image, candidates = None, 0, 0, 0
        for images, real in batches:
            embedded = mesh.gather(self._embed(frozen, images, scale))[:real]
            embedded = embedded.reshape(real, -1, options.width)
            if patches is None:  # one array from the start: there is no room for two
                of_image = embedded.shape[1]
                candidates = min(of_image, -(-options.candidates // count) or of_image)
                wanted = -(-EXPECTING_PATCHES // count) if options.relative else 0
                kept = max(candidates, min(of_image, wanted))
                patches = np.empty((count, kept, options.width), np.float32)
                logging.info(
                    "%d training patches, %d of them candidates, %.1f GiB",
                    *(count * of_image, count * candidates, patches.nbytes / 2**30),
                )
            for i, rows in enumerate(embedded, done):
                drawn = candidates < of_image
                patches[i] = rows[_sample(key, i, of_image, kept)] if drawn else rows
            done += real
        return patches, of_image, candidates

    def predict(self, variables, frozen, images):
        """Squared distance to the nearest bank row, upsampled and smoothed; score: its maximum.

        With patchcore.relative the distance is divided by the one to expect from that row. Of
        several scales, which are the parts, map and score are the sums.
        """
        memory, scales = variables["memory"], by_part(self.config.patchcore.scales)
        parts, peak = {}, 0.0
        for part, scale in scales.items():
            own = memory if len(scales) == 1 else memory[part]
            distance = _distance(own, self.embed(frozen, images, scale))
            peak += anomaly_map.max_score(distance)
            size, sigma = images.shape[1:3], smoothing(scale)
            parts[part] = anomaly_map.upsample_and_smooth(distance, size, False, sigma)
        total = sum(parts.values())
        score = peak if self.config.patchcore.score == "patch" else anomaly_map.max_score(total)
        return {"map": total, "score": score, "parts": parts}


def by_part(scales: tuple[float, ...]) -> dict[str, float]:
    """{name of a part of the map: its scale}."""
    if len(scales) == 1:
        return {"patches": scales[0]}
    return {f"patches{i}": scale for i, scale in enumerate(scales, 1)}


def scaled(size_hw: tuple[int, int], scale: float, layer: int) -> tuple[int, int]:
    """Sides of what the teacher sees.

    Smaller ones are whole cells of the deepest layer in use: a part of a cell would move the map by
    as much, and a cell of a small scale is many pixels wide.
    """
    stride = 1 if scale >= 1 else 2 ** (layer + 1)
    return tuple(max(1, round(side * scale / stride)) * stride for side in size_hw)


def smoothing(scale: float) -> float:
    """Sigma of a map's Gaussian, in px of the image or of what the teacher sees: the larger."""
    return anomaly_map.GAUSSIAN_SIGMA / min(1.0, scale)


def _distance(memory: dict, patches: jax.Array) -> jax.Array:
    """Of patches [b, h, w, d] to the nearest rows of a memory, float32 [b, h, w]."""
    if "whitening" in memory:
        patches = jnp.matmul(patches, memory["whitening"], precision=EXACT)
    b, h, w, d = patches.shape
    patches = patches.reshape(-1, d)
    if "expected" in memory:
        distance, row = nearest_row(patches, memory["bank"])
        distance = distance / jnp.asarray(memory["expected"])[row]
    else:
        distance = nearest_squared_distance(patches, memory["bank"])
    return distance.reshape(b, h, w)


def _sample(key: jax.Array, image: int, n: int, kept: int) -> np.ndarray:
    """`kept` of n patches of an image, drawn without replacement."""
    return np.asarray(jax.random.permutation(jax.random.fold_in(key, image), n)[:kept])


def _neighbourhoods(x: jax.Array, size: int) -> jax.Array:
    """Zero-padded s x s neighbourhoods, channel-major: [b, h, w, c] -> [b, h, w, c * s * s]."""
    b, h, w, c = x.shape
    pad = size // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    shifts = [x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.stack(shifts, axis=-1).reshape(b, h, w, c * size * size)


@functools.lru_cache(maxsize=16)
def adaptive_pool_matrix(n: int, m: int) -> np.ndarray:
    """Adaptive average pooling n -> m as a matrix, float32 [n, m]; columns sum to 1.

    Bin i averages entries floor(i n / m) .. ceil((i + 1) n / m) - 1, as torch does.
    """
    matrix = np.zeros((n, m), np.float32)
    for i in range(m):
        low, high = i * n // m, -(-(i + 1) * n // m)
        matrix[low:high, i] = 1 / (high - low)
    return matrix


def _resize(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Bilinear, averaging where it shrinks: [b, h, w, d] -> [b, *grid, d]."""
    if x.shape[1:3] == grid:
        return x
    rows, columns = (
        anomaly_map.resize_matrix(n_in, n_out).astype(np.float32)
        for n_in, n_out in zip(x.shape[1:3], grid, strict=True)
    )
    return jnp.einsum("yh,xw,bhwd->byxd", rows, columns, x, precision=EXACT)


def whitening(patches: np.ndarray, shrinkage: float, key: jax.Array) -> np.ndarray:
    """The matrix that weighs a difference of patches by how rare it is among good ones.

    A patch of one half of the images differs from its nearest in the other half, and all of that is
    harmless: light, pose, grain. Squared distances after the matrix are Mahalanobis distances under
    the second moments of these differences, over d: about 1 between good patches. PatchCore has no
    such step; PaDiM (arXiv 2011.08785, section 3.2) has it for the patches of one place.

    Args:
      patches: float32 [images, n, d].
      shrinkage: what is added to the diagonal of the differences' correlations; the less, the more
        a rare direction counts, and the more data it takes.
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
        np.concatenate([patches[i][_sample(key_sample, i, n, kept)] for i in half])
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
    """What squared distance a good patch has to the bank row that is nearest to it.

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
    columns = patches.T  # [projection, n]: one row vector times matrix per selected point
    squares = jnp.sum(columns**2, axis=0)
    start = jax.random.choice(key_start, n, (min(start_points, n),), replace=False)
    distance = jnp.mean(
        jnp.stack([_distance_to(columns, squares, i) for i in np.asarray(start)]), axis=0
    )
    chosen = jnp.zeros(rows, jnp.int32)
    per_call = 1 if jax.default_backend() == "cpu" else 256
    for first in logs.progress(range(0, rows, per_call), "coreset"):
        last = min(first + per_call, rows)
        chosen, distance = _choose(columns, squares, chosen, distance, first, last)
    return chosen


@jax.jit
def _distance_to(columns: jax.Array, squares: jax.Array, i: int) -> jax.Array:
    """Euclidean distance of every column to column i, float32 [n]."""
    products = jnp.matmul(columns[:, i], columns, precision=EXACT)
    return jnp.sqrt(jnp.maximum(squares - 2 * products + squares[i], 0.0))


@functools.partial(jax.jit, donate_argnums=(2, 3))
def _choose(columns, squares, chosen, distance, first, last):
    def body(i, carry):
        chosen, distance = carry
        farthest = jnp.argmax(distance).astype(jnp.int32)
        new = _distance_to(columns, squares, farthest)
        # A chosen point must never come again, not even among duplicates at distance 0.
        distance = jnp.minimum(distance, new).at[farthest].set(-1.0)
        return chosen.at[i].set(farthest), distance

    return jax.lax.fori_loop(first, last, body, (chosen, distance))

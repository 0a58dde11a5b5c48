"""Pixel metrics of test sets whose maps do not fit in memory, from integer histograms.

Every batch of maps is counted and dropped. Each image and each defect region keeps the number of
its pixels in every occupied bucket of scores, about 10 KB per image. Regions have histograms of
their own because AU-PRO weighs a pixel by 1 / area, which is no integer: the division comes last.
The scores of one bucket count as tied. Their true order is unknown, so every value comes with the
lowest and the highest value that any order allows. `pro_mmr` is exact: it concerns single images,
and is computed while their map is at hand.

A bucket is the upper half of a float32 score's bits, put in the order of the scores: 2^16 buckets,
128 for every doubling, whatever the range of the maps (scores closer to 0 than 1e-38 count as 0).
A batch is counted on device in int32; the sum over batches is int64 on the host. float32 counts
would lose units above 2^24.

The only module of the metrics that uses JAX. mmrjax/evaluate/scoring.py chooses between this form
and exact.py by eval.pixel_metrics.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from scipy import sparse

from mmrjax.metrics import bootstrap as bootstrap_lib
from mmrjax.metrics import domain, misses, pro, ranking
from mmrjax.runtime import mesh as mesh_lib

BUCKETS = 1 << 16
FINITE = range(128, 65408)  # buckets of finite scores; infinity and NaN lie outside
ROWS = 128  # histograms that one call fills

_BINS = 2048  # bins of the histograms behind the intervals; more buckets are joined


class Counted(NamedTuple):
    """Histograms of some images; has the interface of `exact.Pixels`, with bounds.

    Attributes:
        normal: [n, BUCKETS] sparse int32, normal pixels of each image.
        defect: [r, BUCKETS] sparse int32, pixels of each defect region.
        image: [r] index of the image that holds the region.
        area: [r] pixels of the region.
        pro_mmr: [n] per-image value, NaN if undefined.
        peaks: [n] the highest value of each map.
        side: [r] the longer side of the region, px.
        peak: [r] the highest value of the map in it.
    """

    normal: sparse.csr_array
    defect: sparse.csr_array
    image: np.ndarray
    area: np.ndarray
    pro_mmr: np.ndarray
    peaks: np.ndarray
    side: np.ndarray
    peak: np.ndarray

    def select(self, rows: np.ndarray) -> "Counted":
        """The images whose `rows` [n] is true."""
        regions, index = rows[self.image], np.cumsum(rows) - 1
        return Counted(
            self.normal[rows],
            self.defect[regions],
            index[self.image[regions]],
            self.area[regions],
            self.pro_mmr[rows],
            self.peaks[rows],
            self.side[regions],
            self.peak[regions],
        )

    def defects(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image [r], longer side in px [r] and highest map value [r] of every defect region."""
        return self.image, self.side, self.peak

    def tables(self) -> tuple[ranking.Ranked, ranking.Ranked]:
        """Rankings of defect pixels against normal pixels: of weight 1, and of weight 1 / area."""
        normal, defect = (t.sum(axis=0, dtype=np.int64) for t in (self.normal, self.defect))
        overlap = self.defect.T @ (1 / self.area)
        best_first = np.flatnonzero(normal + defect)[::-1]
        pixel = ranking.from_counts(defect[best_first], normal[best_first])
        return pixel, pixel._replace(positive=overlap[best_first])

    def bounds(self) -> dict[str, tuple[float, float]]:
        """{metric: (lowest, highest)} possible value, for the metrics taken from buckets."""
        pixel, region = self.tables()
        return {
            "pixel_auroc": ranking.area_bounds(pixel),
            "pixel_ap": ranking.precision_bounds(pixel),
            "pixel_f1_max": ranking.f1_bounds(pixel),
            "aupro_0.3": ranking.area_bounds(region, domain.PRO_LIMIT),
        }

    def group_histograms(self, group: np.ndarray, groups: int) -> bootstrap_lib.GroupHistograms:
        """Histograms of every group of images; `group` [n] indexes range(groups)."""
        owner, row = np.unique(group[self.image], return_inverse=True)
        occupied = np.unique(np.concatenate([self.normal.indices, self.defect.indices]))
        bins = min(_BINS, len(occupied))
        bin_of = np.zeros(BUCKETS, np.int64)
        bin_of[occupied] = bins - 1 - np.arange(len(occupied)) * bins // len(occupied)  # best first
        return bootstrap_lib.GroupHistograms(
            _dense(self.normal, np.ones(len(group)), bin_of, group, (groups, bins)),
            owner,
            _dense(self.defect, np.ones(len(row)), bin_of, row, (len(owner), bins)),
            _dense(self.defect, 1 / self.area, bin_of, row, (len(owner), bins)),
        )

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Scores below which these shares of all pixels lie, to the width of a bucket (0.8 %)."""
        counts = sum(t.sum(axis=0, dtype=np.int64) for t in (self.normal, self.defect))
        below = np.cumsum(counts[FINITE.start : FINITE.stop])
        place = np.searchsorted(below, np.asarray(shares) * below[-1])
        return [float(score) for score in bucket_edges()[np.minimum(place, len(below) - 1)]]


def _dense(
    table: sparse.csr_array, weight: np.ndarray, bin_of: np.ndarray, line: np.ndarray, shape: tuple
) -> np.ndarray:
    """Dense [shape] sums of weighted histograms.

    Row i of `table`, times `weight[i]`, is added to line `line[i]`; bucket j to column `bin_of[j]`.
    """
    per_row = np.diff(table.indptr)
    slot = np.repeat(line, per_row) * shape[1] + bin_of[table.indices]
    total = np.bincount(slot, table.data * np.repeat(weight, per_row), shape[0] * shape[1])
    return total.reshape(shape)


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
def bucket_counts(
    maps: jax.Array, row: jax.Array, mesh: jax.sharding.Mesh, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Histograms of a batch, summed over the devices; only occupied buckets come back.

    Args:
        maps: float32 [b, h, w]; b is divisible by the devices of `mesh`.
        row: int32 [b, h, w], number of the histogram that counts the pixel; pixels with a number
            outside 0..ROWS - 1 (padding, or of another call) are left out.
        mesh: with a "data" axis, over which the batch is split.
        width: largest number of buckets that can come back.

    Returns:
        The bucket of each column, int32 [width], ascending, filled up with BUCKETS; the counts,
        int32 [ROWS, width]; and the number of occupied buckets. A number above `width` says that
        some of them are missing.

    Raises:
        ValueError: the batch has too many pixels for int32 counts.
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
    split, replicated = PartitionSpec("data"), PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=replicated)(maps, row)


def bucket_edges() -> np.ndarray:
    """Smallest score of every finite bucket, float32 [len(FINITE)], ascending."""
    ordered = (np.arange(FINITE.start, FINITE.stop, dtype=np.int64) - BUCKETS // 2) << 16
    bits = np.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).astype(np.int32)
    return bits.view(np.float32)


class MapHistograms:
    """Histograms of a test set whose maps arrive batch by batch."""

    def __init__(self, mesh: jax.sharding.Mesh):
        """Starts with no image; the devices of `mesh` share every batch."""
        self._mesh, self._width = mesh, 1024
        self._images, self._regions = 0, 0
        self._parts: list[Counted] = []

    def add(self, maps: jax.Array | np.ndarray, masks: np.ndarray) -> None:
        """Counts a batch.

        Args:
            maps: float32 [b, h, w], b divisible by the devices.
            masks: bool [n, h, w] with n <= b: defect pixels of the first n maps, all false for good
                images and without pixel truth. The other maps are padding. h and w may differ from
                batch to batch.

        Raises:
            ValueError: NaN or infinity in a map, or shapes that do not fit.
        """
        if maps.shape[1:] != masks.shape[1:] or len(masks) > len(maps):
            raise ValueError(f"maps {maps.shape} and masks {masks.shape} must have one shape")
        regions, n = pro.regions(masks), len(masks)
        row = np.full(maps.shape, -1, np.int32)
        row[:n] = np.arange(n)[:, None, None]
        row.ravel()[regions.pixel] = n + np.repeat(np.arange(len(regions.area)), regions.area)
        table = self._count(maps, row, n + len(regions.area))
        self._require_finite(table, n, regions.image)
        pro_mmr, peak = np.full(n, np.nan), np.zeros(0, np.float32)
        peaks = np.asarray(maps.max(axis=(1, 2)))[:n]
        if len(regions.area):
            host = np.asarray(maps)[:n]
            pro_mmr = pro.pro_mmr_per_image(host, regions)
            peak = regions.highest(host.ravel()[regions.pixel])
        image = regions.image + self._images
        columns = (image, regions.area, pro_mmr, peaks, regions.sides(), peak)
        self._parts.append(Counted(table[:n], table[n:], *columns))
        self._images += n

    def counted(self) -> Counted:
        """Histograms of all images so far, in the order in which they came."""
        if not self._parts:
            raise ValueError("no map was added; add at least one batch")
        normal, defect, *columns = zip(*self._parts, strict=True)
        return Counted(
            sparse.vstack(normal, format="csr"),
            sparse.vstack(defect, format="csr"),
            *(np.concatenate(column) for column in columns),
        )

    def _count(self, maps, row: np.ndarray, rows: int) -> sparse.csr_array:
        """[rows, BUCKETS] histograms of one batch, ROWS of them per call."""
        maps = mesh_lib.put_batch(maps, self._mesh)
        tables = []
        for start in range(0, rows, ROWS):
            part = mesh_lib.put_batch(row - start, self._mesh)
            columns, counts, occupied = bucket_counts(maps, part, self._mesh, self._width)
            while int(occupied) > self._width:  # compiles anew; later batches use the new width
                self._width *= 2
                columns, counts, occupied = bucket_counts(maps, part, self._mesh, self._width)
            columns = np.asarray(columns)[: int(occupied)]
            table = sparse.csr_array(np.asarray(counts)[: rows - start, : len(columns)])
            wide = (table.data, columns[table.indices], table.indptr)
            tables.append(sparse.csr_array(wide, shape=(table.shape[0], BUCKETS)))
        return sparse.vstack(tables, format="csr")

    def _require_finite(self, table: sparse.csr_array, n: int, image: np.ndarray) -> None:
        """Raises ValueError naming the first image with a pixel outside the finite buckets."""
        line = np.repeat(np.concatenate([np.arange(n), image]), np.diff(table.indptr))
        finite = (table.indices >= FINITE.start) & (table.indices < FINITE.stop)
        if not finite.all():
            raise ranking.not_finite(
                len(set(line[~finite])),
                self._images + n,
                "anomaly maps",
                self._images + line[~finite].min(),
            )


def measure(
    scores: np.ndarray,
    counted: Counted,
    is_anomaly: np.ndarray,
    has_mask: np.ndarray,
    groups: Sequence | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    tiny_side: int = misses.TINY_SIDE,
) -> domain.Measured:
    """`exact.measure` from histograms in place of maps and masks.

    Args:
        scores: [n] image scores.
        counted: histograms of the same n images, in their order.
        is_anomaly: [n] bool.
        has_mask: [n] bool, false for images without pixel truth.
        groups: [n] as in `exact.measure`.
        bootstrap: number of resamples for the intervals; 0 for none.
        seed: seeds the resampling.
        tiny_side: regions without a side of so many px are tiny.

    Raises:
        ValueError: NaN or infinity in the scores, or arrays of different lengths.
    """
    scores, is_anomaly = domain.checked_scores(scores, is_anomaly)
    if not len(scores) == counted.normal.shape[0] == len(has_mask):
        raise ValueError(
            f"{len(scores)} scores, {counted.normal.shape[0]} maps and {len(has_mask)} has_mask "
            "must be of the same images"
        )
    used = ~is_anomaly | np.asarray(has_mask)
    empty = np.bincount(counted.image, minlength=len(scores)) == 0
    chosen = counted.select(used)
    reason = domain.pixel_reason(True, is_anomaly, used, empty)
    if reason is None and not chosen.normal.nnz:
        reason = "no normal pixel"
    return domain.assemble(
        scores, is_anomaly, used, empty, reason or chosen, groups, bootstrap, seed, tiny_side
    )

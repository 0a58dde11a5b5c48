"""Pixel metrics of sets that are too large to keep: integer histograms instead of maps.

Batches of maps go in and are forgotten; what stays per image and per defect region is how many of
its pixels fell into each occupied bucket of scores (buckets.py), about 10 KB per image. Regions
keep histograms of their own because AU-PRO weighs a pixel by 1 / area, which is no integer: the
division comes last. Scores within a bucket are taken as tied, and since their true order is
unknown, every value comes with the lowest and the highest it could be. `pro_mmr` is exact: it is a
matter of single images, and is taken while their map is at hand.

Called by evaluate/results.py, for which eval.pixel_metrics chooses between this and pixels.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from scipy import sparse

from mmrjax.metrics import bootstrap, buckets, domain, misses, pro, ranking
from mmrjax.runtime import mesh as mesh_lib

_BINS = 2048  # of the histograms behind the intervals: occupied buckets are joined beyond that


class Counted(NamedTuple):
    """Histograms of some images; a drop-in for `pixels.Pixels`, with bounds.

    Attributes:
        normal: [n, BUCKETS] sparse int32, normal pixels of each image.
        defect: [r, BUCKETS] sparse int32, pixels of each defect region.
        image: [r] index of the image that holds the region.
        area: [r] pixels of the region.
        pro_mmr: [n] per-image value, NaN where undefined.
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
        """The images where `rows` [n] is true."""
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
        """Of each defect region the image [r], its longer side in px, and its highest value."""
        return self.image, self.side, self.peak

    def tables(self) -> tuple[ranking.Ranked, ranking.Ranked]:
        """Defect pixels against normal ones, each counting 1, then each weighing 1 / area."""
        normal, defect = (t.sum(axis=0, dtype=np.int64) for t in (self.normal, self.defect))
        overlap = self.defect.T @ (1 / self.area)
        best_first = np.flatnonzero(normal + defect)[::-1]
        pixel = ranking.from_counts(defect[best_first], normal[best_first])
        return pixel, pixel._replace(positive=overlap[best_first])

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Interval that surely holds the exact value, for the metrics taken from buckets."""
        pixel, region = self.tables()
        return {
            "pixel_auroc": ranking.area_bounds(pixel),
            "pixel_ap": ranking.precision_bounds(pixel),
            "pixel_f1_max": ranking.f1_bounds(pixel),
            "aupro_0.3": ranking.area_bounds(region, domain.PRO_LIMIT),
        }

    def group_histograms(self, group: np.ndarray, groups: int) -> bootstrap.GroupHistograms:
        """Histograms of every group of images; `group` [n] indexes range(groups)."""
        owner, row = np.unique(group[self.image], return_inverse=True)
        occupied = np.unique(np.concatenate([self.normal.indices, self.defect.indices]))
        bins = min(_BINS, len(occupied))
        cell = np.zeros(buckets.BUCKETS, np.int64)
        cell[occupied] = bins - 1 - np.arange(len(occupied)) * bins // len(occupied)  # best first

        ones = np.ones(len(group)), np.ones(len(row))
        return bootstrap.GroupHistograms(
            _dense(self.normal, ones[0], cell, group, (groups, bins)),
            owner,
            _dense(self.defect, ones[1], cell, row, (len(owner), bins)),
            _dense(self.defect, 1 / self.area, cell, row, (len(owner), bins)),
        )

    def quantiles(self, shares: Sequence[float]) -> list[float]:
        """Scores below which these shares of all pixels lie, to the width of a bucket (0.8 %)."""
        counts = sum(t.sum(axis=0, dtype=np.int64) for t in (self.normal, self.defect))
        below = np.cumsum(counts[buckets.FINITE.start : buckets.FINITE.stop])
        place = np.searchsorted(below, np.asarray(shares) * below[-1])
        return [float(score) for score in buckets.edges()[np.minimum(place, len(below) - 1)]]


def _dense(
    table: sparse.csr_array, weight: np.ndarray, cell: np.ndarray, line: np.ndarray, shape: tuple
) -> np.ndarray:
    """Rows of `table` times `weight`, summed by `line` [rows], their buckets by `cell`."""
    per_row = np.diff(table.indptr)
    slot = np.repeat(line, per_row) * shape[1] + cell[table.indices]
    total = np.bincount(slot, table.data * np.repeat(weight, per_row), shape[0] * shape[1])
    return total.reshape(shape)


class MapHistograms:
    """Takes the maps of a test set batch by batch and keeps their histograms."""

    def __init__(self, mesh: jax.sharding.Mesh):
        """Counts on the devices of `mesh`, which share every batch."""
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
        found, n = pro.regions(masks), len(masks)
        row = np.full(maps.shape, -1, np.int32)
        row[:n] = np.arange(n)[:, None, None]
        row.ravel()[found.pixel] = n + np.repeat(np.arange(len(found.area)), found.area)
        table = self._count(maps, row, n + len(found.area))
        self._require_finite(table, n, found.image)
        pro_mmr, peak = np.full(n, np.nan), np.zeros(0, np.float32)
        peaks = np.asarray(maps.max(axis=(1, 2)))[:n]
        if len(found.area):
            host = np.asarray(maps)[:n]
            pro_mmr = pro.pro_mmr_per_image(host, found)
            peak = found.highest(host.ravel()[found.pixel])
        image = found.image + self._images
        columns = (image, found.area, pro_mmr, peaks, found.sides(), peak)
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
        for start in range(0, rows, buckets.ROWS):
            part = mesh_lib.put_batch(row - start, self._mesh)
            columns, counts, occupied = buckets.count(maps, part, self._mesh, self._width)
            while int(occupied) > self._width:  # compiles again; the width is kept for later
                self._width *= 2
                columns, counts, occupied = buckets.count(maps, part, self._mesh, self._width)
            columns = np.asarray(columns)[: int(occupied)]
            table = sparse.csr_array(np.asarray(counts)[: rows - start, : len(columns)])
            wide = (table.data, columns[table.indices], table.indptr)
            tables.append(sparse.csr_array(wide, shape=(table.shape[0], buckets.BUCKETS)))
        return sparse.vstack(tables, format="csr")

    def _require_finite(self, table: sparse.csr_array, n: int, image: np.ndarray) -> None:
        """Raises ValueError naming the first image with a pixel outside the finite buckets."""
        line = np.repeat(np.concatenate([np.arange(n), image]), np.diff(table.indptr))
        finite = (table.indices >= buckets.FINITE.start) & (table.indices < buckets.FINITE.stop)
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
    """As `evaluation.measure`, from histograms in place of maps and masks.

    Args:
        scores: [n] image scores.
        counted: histograms of the same n images, in their order.
        is_anomaly: [n] bool.
        has_mask: [n] bool, false where the image has no pixel truth.
        groups: [n] as in `evaluation.evaluate`.
        bootstrap: as there.
        seed: as there.
        tiny_side: as there.

    Raises:
        ValueError: as there.
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

"""Rate of Poisson blending against cv2.seamlessClone: python -m mmrjax.bench_defects.

Both blend the same ragged defects of 16 to 64 px, cut from one noisy picture, into another, on one
core. First parity: ours equals a sparse direct solution of the same equations, within a grey level.
Then the two are timed in turn, in processor time, which other programs on the machine disturb
least. (cv2 solves another problem, on the whole rectangle and with a smaller mask, so its pixels
are no reference; its rate is.) Last comes what a training step pays for a synthetic row: the whole
generator, which draws, places and blends, in windows of 24 or 128 px. No data set is needed.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import cv2
import jax
import numpy as np
from scipy import ndimage, sparse
from scipy.sparse import linalg

from mmrjax import memory
from mmrjax.data import defects, poisson

WINDOWS = {16: 24, 24: 32, 32: 40, 48: 56, 64: 72}  # px of a defect -> px of its window
BATCH_PIXELS = 50_000  # blended at once, so that the arrays stay in the cache
LARGEST_DIFFERENCE = 0.5  # grey levels from the direct solution: less than rounding


def make_case(size: int, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sources, targets) uint8 [b, n, n, 3] and regions bool [b, n, n] about `size` px across."""
    rng, n = np.random.default_rng(size), WINDOWS[size]
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    angle, k = np.arctan2(y, x)[..., None], np.arange(2, 33)
    regions = []
    for _ in range(batch):
        waves = 0.35 / k * rng.normal(size=31) * np.cos(k * angle + rng.uniform(0, 6.3, 31))
        radius = 1 + waves.sum(-1)
        regions.append(np.hypot(y, x) < size / 2 * np.clip(radius / radius.max(), 0.2, 1))
    grain = ndimage.gaussian_filter(rng.normal(size=(2, batch, n, n, 3)), (0, 0, 2, 2, 0))
    level = rng.uniform(90, 160, (2, batch, 1, 1, 3))
    pictures = level + 60 * grain + rng.normal(0, 5, grain.shape)
    sources, targets = np.clip(np.round(pictures), 0, 255).astype(np.uint8)
    return sources, targets, np.stack(regions)


def direct(source: np.ndarray, target: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The sparse direct solution of poisson.py's equation, float64 [n, n, 3]."""
    number = np.full(region.shape, -1)
    number[region] = np.arange(region.sum())
    r, c = np.nonzero(region)
    matrix = sparse.lil_matrix((len(r),) * 2)
    matrix.setdiag(4.0)
    source, result = source.astype(np.float64), target.astype(np.float64)
    right = np.zeros((len(r), 3))
    for dr, dc in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        right += source[r, c] - source[r + dr, c + dc]
        inside = region[r + dr, c + dc]
        matrix[np.flatnonzero(inside), number[r + dr, c + dc][inside]] = -1.0
        right[~inside] += result[r + dr, c + dc][~inside]
    result[region] = linalg.spsolve(matrix.tocsc(), right)
    return result


def blend_cv2(sources: np.ndarray, targets: np.ndarray, regions: np.ndarray) -> None:
    """One call per defect; the mask is copied because seamlessClone writes into it."""
    n = regions.shape[1]
    for source, target, region in zip(sources, targets, regions, strict=True):
        mask = region.astype(np.uint8) * 255
        cv2.seamlessClone(source, target, mask, (n // 2, n // 2), cv2.NORMAL_CLONE)


def measure(size: int, batch: int, repeats: int) -> dict[str, float]:
    """Parity, then milliseconds per defect of both, timed in turn, and their ratio."""
    batch = batch or max(8, min(32, BATCH_PIXELS // WINDOWS[size] ** 2))
    sources, targets, regions = make_case(size, batch)
    blend = jax.jit(lambda s, t, r: poisson.blend(s.astype(np.float32), t.astype(np.float32), r))
    found = np.asarray(blend(sources, targets, regions))
    wanted = np.stack([direct(*a) for a in zip(sources, targets, regions, strict=True)])
    difference = float(np.abs(found - wanted).max())
    if not difference <= LARGEST_DIFFERENCE:
        raise ValueError(f"{size} px: differs from the direct solution by {difference:.3f} levels")
    on_device = jax.device_put((sources, targets, regions))
    ours, theirs = [], []
    for _ in range(repeats):
        ours.append(_seconds(lambda: jax.block_until_ready(blend(*on_device))))
        theirs.append(_seconds(lambda: blend_cv2(sources, targets, regions)))
    ours_ms, theirs_ms = (1e3 * float(np.median(t)) / batch for t in (ours, theirs))
    return {
        "batch": batch,
        "difference_grey_levels": round(difference, 4),
        "mmrjax_ms": round(ours_ms, 4),
        "cv2_ms": round(theirs_ms, 4),
        "ratio": round(theirs_ms / ours_ms, 2),
    }


def generator(images: int, repeats: int, size: int = 224) -> dict[str, float]:
    """Milliseconds an image of `defects.synthesise`, all kinds of the training."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(60, 200, (images, 1, 1, 1)) + rng.normal(0, 6, (images, size, size, 3))
    pictures = jax.device_put(np.clip(pictures, 0, 255).astype(np.uint8))
    draw = jax.jit(lambda key: defects.synthesise(key, pictures, None, defects.DefectSettings()))
    keys = jax.random.split(jax.random.key(0), repeats + 1)
    jax.block_until_ready(draw(keys[0]))
    spent = [_seconds(lambda k=key: jax.block_until_ready(draw(k))) for key in keys[1:]]
    return {"images": images, "px": size, "mmrjax_ms": round(1e3 * np.median(spent) / images, 4)}


def _seconds(task: Callable[[], object]) -> float:
    started = time.process_time()
    task()
    return time.process_time() - started


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Where the system can: threads that wait for each other would count as processor time."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, WINDOWS)), help="px of the defects")
    parser.add_argument(
        "--batch", type=int, default=0, help="defects blended at once (0: by their size)"
    )
    parser.add_argument("--images", type=int, default=16, help="that the generator gets at once")
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args(argv)
    sizes = [int(s) if s.isdigit() else s for s in arguments.sizes.split(",")]
    wrong = [s for s in sizes if s not in WINDOWS]
    if wrong or arguments.batch < 0 or min(arguments.images, arguments.repeats) < 1:
        parser.error(
            f"--sizes takes some of {list(WINDOWS)}, --batch at least 0, --images and --repeats 1"
        )
    cv2.setNumThreads(1)
    memory.keep_freed()
    with _one_core():
        result = {f"{s}_px": measure(s, arguments.batch, arguments.repeats) for s in sizes}
        result["generator"] = generator(arguments.images, arguments.repeats)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

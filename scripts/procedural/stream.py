"""Batches of episodes, drawn by other processes while the network trains.

Episode i of a seed does not depend on the process or the time that draws it. A stopped run goes on
with the episode at which it stopped, and no picture is ever seen twice.
"""

import collections
import multiprocessing
import pathlib
import tempfile
from collections.abc import Iterator
from concurrent import futures

import cv2
import numpy as np

from procedural import scenes, textures

Batch = tuple[np.ndarray, np.ndarray]
_AHEAD = 3  # batches a worker has in hand


def batches(
    seed: int, classes: int, episodes: int, views: int, start: int, stop: int, workers: int
) -> Iterator[Batch]:
    """Yields batches `start` to `stop`, in order.

    Args:
      seed: draws textures and episodes.
      classes: number of textures.
      episodes: number of episodes in a batch.
      views: number of views of an episode.
      start: the first batch.
      stop: the batch after the last.
      workers: processes that draw.

    Yields:
      (images uint8 [episodes, views, h, w, 3], damage uint8 [episodes, views, h, w]).
    """
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        futures.ProcessPoolExecutor(workers, context) as pool,
    ):
        path = pathlib.Path(folder) / "sheets.npy"
        np.save(
            path,
            np.stack(
                list(pool.map(textures.sheet, [seed] * classes, range(classes), chunksize=16))
            ),
        )
        waiting, following = collections.deque(), start
        while waiting or following < stop:
            while following < stop and len(waiting) < _AHEAD * workers:
                waiting.append(pool.submit(_draw, path, seed, following, episodes, views))
                following += 1
            yield waiting.popleft().result()


def _draw(path: pathlib.Path, seed: int, batch: int, episodes: int, views: int) -> Batch:
    cv2.setNumThreads(1)
    sheets = np.load(path, mmap_mode="r", allow_pickle=False)
    first = batch * episodes
    drawn = [
        scenes.episode(np.random.default_rng([seed, i]), sheets, views)
        for i in range(first, first + episodes)
    ]
    return np.stack([images for images, _ in drawn]), np.stack([damage for _, damage in drawn])

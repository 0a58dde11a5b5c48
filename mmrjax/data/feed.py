"""Feeding the training step: images resident in device memory, or streamed by Grain.

Both yield the same batches, in chunks of whole steps, from any step on. `resident` keeps all
training images as uint8 on every device and sends only indices; `stream` decodes two chunks ahead
of the step. As many threads decode the images of a chunk as there are cores. With several processes
each decodes only its share: of a streamed batch the rows of its own devices; of resident images an
even part, which the devices then exchange.
"""

import concurrent.futures
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging

from mmrjax.data import epochs, foreground
from mmrjax.data.records import Records
from mmrjax.runtime import devices, logs, mesh

STREAM_CHUNK_BYTES = 2**28
# px; another draw of the images that train seldom has another canvas, and compiles nothing anew
CANVAS_STEP = 32


class Feed:
    """Chunks of training batches.

    Attributes:
      canvas: (height, width) that every training image is padded to, multiples of CANVAS_STEP.
      resident: {"image": uint8 [n, h, w, 3], "size": int32 [n, 2]} on device, or {} when streamed.
        If the plan knows the examples' domains, also "domain": int32 [n]; if the plan wants the
        foreground, it is the fourth channel of the images, 0 or 255.
    """

    def __init__(
        self,
        records: Records,
        *,
        mode: str,
        resident_gib: float,
        max_side: int,
        plan: epochs.Plan,
        seed: int,
        steps_per_call: int,
        device_mesh: jax.sharding.Mesh,
    ):
        """Prepares the feed.

        `plan` says how batches are filled. `mode` is resident, stream or auto (resident if it
        fits). `steps_per_call` is the most steps of a chunk: see `_cuts`.
        """
        self._records, self._max_side = records, max_side
        self._plan, self._mesh, self._seed = plan, device_mesh, seed
        count = len(records)
        self._threads = devices.cores()
        # Every step of an epoch reads the same table.
        self._table = functools.lru_cache(2)(self._planned)
        self.steps_per_epoch = plan.steps_per_epoch(count)
        shared = -(-count // device_mesh.size) * device_mesh.size  # rows that the devices can share
        own = np.flatnonzero(mesh.own_rows(shared, device_mesh)[:count])
        sizes = np.zeros((shared, 2), np.int32)
        for position in own:
            sizes[position] = records.size(position, max_side)
        sizes = mesh.complete(sizes, device_mesh)[:count]
        self.canvas = tuple(-(-int(n) // CANVAS_STEP) * CANVAS_STEP for n in sizes.max(axis=0))
        self._channels = 3 + plan.foreground
        gib = count * self.canvas[0] * self.canvas[1] * self._channels / 2**30
        if mode == "auto":  # each device holds them; those of a CPU share its memory
            on_cpu = jax.default_backend() == "cpu"
            held = gib * (len(device_mesh.local_devices) if on_cpu else 1)
            mode = "resident" if held <= resident_gib else "stream"
        if mode == "stream":  # a chunk travels whole, and several wait in the queue
            batch_bytes = plan.batch_size * self.canvas[0] * self.canvas[1] * self._channels
            steps_per_call = min(steps_per_call, max(1, STREAM_CHUNK_BYTES // batch_bytes))
        self._cuts = _cuts(self.steps_per_epoch, max(steps_per_call, 1))
        logging.info("%d training images, canvas %s, %s, %.2f GiB", count, self.canvas, mode, gib)
        self.resident = {}
        if mode == "resident":
            images = np.zeros((shared, *self.canvas, self._channels), np.uint8)
            canvases = [images[position] for position in own]
            for _ in logs.progress(self._pasted(canvases, own), "decoding", len(own)):
                pass
            images = mesh.spread(mesh.put_batch(images, device_mesh), device_mesh, count)
            self.resident = {"image": images, "size": mesh.replicate(sizes, device_mesh)}
            if plan.domain is not None:
                self.resident["domain"] = mesh.replicate(plan.domain, device_mesh)

    def chunks(self, start: int, stop: int) -> Iterator[dict]:
        """Yields the batches of steps [start, stop), k at a time, on device.

        Each chunk holds "index" int32 and "weight" float32 [k, b], and when streamed also "image"
        uint8 [k, b, h, w, 3], "size" int32 [k, b, 2] and, if known, "domain" int32 [k, b]. If the
        plan pairs examples, "second" int32 [k, b] and, streamed, "second_image", "second_size"; if
        the plan counts its defects, "defective" bool [k, b].
        Chunks end where those of a run from step 0 end: a resumed run makes the same calls.
        """
        spans = list(self._spans(start, stop))
        if self.resident:
            for span in spans:
                yield mesh.put_batch(self._rows(*span), self._mesh, axis=1)
            return
        import grain  # here: resident images need it not

        dataset = grain.MapDataset.range(len(spans)).map(lambda i: self._decoded(*spans[i]))
        # Two chunks at once: the second keeps cores busy while the first waits for its last images.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        for chunk in dataset.to_iter_dataset(options):
            yield mesh.put_batch(chunk, self._mesh, axis=1)

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The steps [first, end) of each chunk."""
        while start < stop:
            row = start % self.steps_per_epoch
            end = start - row + next(cut for cut in self._cuts if cut > row)
            yield start, min(end, stop)
            start = end

    def _rows(self, first: int, end: int) -> dict[str, np.ndarray]:
        epoch, row = divmod(first, self.steps_per_epoch)
        rows = slice(row, row + end - first)
        return {name: column[rows] for name, column in self._table(epoch).items()}

    def _planned(self, epoch: int) -> dict[str, np.ndarray]:
        """The columns of an epoch, [steps, batch] each."""
        count = len(self._records)
        index, weight = self._plan.table(count, self._seed, epoch)
        columns = {"index": index, "weight": weight}
        if self._plan.defects is not None and self._plan.defects.second:
            columns["second"] = self._plan.seconds(index, count, self._seed, epoch)
        if self._plan.defective is not None:
            columns["defective"] = self._plan.chosen(index, weight, count, self._seed, epoch)
        return columns

    def _decoded(self, first: int, end: int) -> dict[str, np.ndarray]:
        chunk = self._rows(first, end)
        chunk["image"], chunk["size"] = self._canvases(chunk["index"])
        if "second" in chunk:
            chunk["second_image"], chunk["second_size"] = self._canvases(chunk["second"])
        if self._plan.domain is not None:
            chunk["domain"] = self._plan.domain[chunk["index"]]
        return chunk

    def _canvases(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decoded images uint8 [k, b, *canvas, c] and sizes int32 [k, b, 2] at `positions` [k, b].

        Rows of other processes stay empty.
        """
        images = np.zeros((*positions.shape, *self.canvas, self._channels), np.uint8)
        sizes = np.zeros((*positions.shape, 2), np.int32)
        own = np.flatnonzero(mesh.own_rows(positions.shape[1], self._mesh))
        rows = list(itertools.product(range(len(positions)), own))
        pasted = self._pasted([images[row] for row in rows], [positions[row] for row in rows])
        for row, size in zip(rows, pasted, strict=True):
            sizes[row] = size
        return images, sizes

    def _pasted(
        self, canvases: Sequence[np.ndarray], positions: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Decodes an image into each canvas, by threads; yields their sizes in the same order."""
        with concurrent.futures.ThreadPoolExecutor(self._threads, "decode") as pool:
            yield from pool.map(self._paste, canvases, positions)

    def _paste(self, canvas: np.ndarray, position: int) -> tuple[int, int]:
        image = self._records.image(position, self._max_side)
        h, w = image.shape[:2]
        canvas[:h, :w, :3] = image
        if self._plan.foreground:
            fills = self._plan.fills is not None and self._plan.fills[position]
            canvas[:h, :w, 3] = 255 if fills else 255 * foreground.foreground(image)
        return h, w


def _cuts(steps: int, most: int) -> list[int]:
    """The steps at which the chunks of an epoch end; no chunk has more than `most` steps.

    Chunks have equal length, so that the step compiles once, unless that needs twice as many chunks
    as the minimum. In that case, as when `steps` is prime, there are two lengths, one step apart.
    """
    fewest = -(-steps // most)
    count = next((n for n in range(fewest, 2 * fewest) if steps % n == 0), fewest)
    return [-(-steps * n // count) for n in range(1, count + 1)]

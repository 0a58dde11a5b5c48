"""PatchCore (arXiv 2106.08265): nearest neighbours in a memory bank of teacher patches.

Follows the official code where it differs from the paper: squared distance to the nearest bank row,
no re-weighting. No gradients: the bank is built by `fit` from a greedy coreset. Three options of
our own, off by default: `whiten`, `relative` and `coreset_of`.
"""

import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mmrjax.methods import anomaly_map, base, memory_bank, patch_embedding
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh

COVERED = ("all", "image")  # by a coreset: patchcore.coreset_of
EXPECTING_PATCHES = 1 << 19  # that tell what distance to expect from a bank row
LARGEST_BANK = 0.1  # share of the training patches up to which statistics by place mean something
SMALLEST_SCALED = 32  # px of an image that patchcore.scales shrinks: two cells of layer 3


class PatchCore(base.Method):
    """Frozen backbone, coreset memory bank, nearest-neighbour distance maps."""

    name = "patchcore"
    title = "PatchCore"
    paper_weights: ClassVar = {"teacher": "wide_resnet50_2-95faca4d"}
    free = ("optim.", "train.epochs", "train.batch_size", "train.augment", "train.crop_")

    @classmethod
    def defaults(cls):
        """The group `patchcore`, with the values of the official code."""
        own = ConfigDict()
        own.layers = (2, 3)
        own.patch = 3  # neighbourhood that one feature sees
        own.width = 1024  # of an embedded patch; 0: the channels of all layers, not pooled
        own.per_image = False  # standardise features per image: light and background weigh less
        own.coreset = 0.01  # share of all patches (of a scale) kept in its memory bank
        # all (one choice among all patches) | image (each image chooses its rows by itself, 1000 or
        # more in all; not in the paper: leaving an image out is then as if it had never been there)
        own.coreset_of = "all"
        # Sides of what the teacher sees, relative to the image; several: a bank and a map for each
        own.scales = (1.0,)
        own.candidates = 0  # patches that the coreset is chosen from, drawn at random; 0: all
        own.projection = 128  # width of the random projection in which the coreset is chosen
        own.start_points = 10
        # Not in the paper, both learnt from how training images differ from each other:
        own.whiten = 0.0  # shrinkage (as 0.1) of Mahalanobis distances; 0: Euclidean ones
        own.relative = False  # distances over those to expect from the same bank row
        own.score = "smoothed"  # smoothed (maximum of the map) | patch (maximum of raw patches)
        return ConfigDict({"patchcore": own})

    @classmethod
    def check(cls, config):
        """Refuses banks without rows and scales that are too small or in no order."""
        choices = {"patchcore.score": ("smoothed", "patch"), "patchcore.coreset_of": COVERED}
        config_lib.check_choices(config, choices)
        config_lib.check_ranges(
            config,
            ("patchcore.layers", 1, 3),
            ("patchcore.coreset", 1e-6, 1.0),  # a share, not percent
            ("patchcore.candidates", 0, 1 << 40),
            ("patchcore.width", 0, 1 << 20),
            ("patchcore.scales", 0.1, 8.0),
            ("patchcore.whiten", 0.0, 1e6),
        )
        config_lib.check_different(config, "patchcore.layers")
        scales, side = config.patchcore.scales, min(config.data.image_size)
        if not scales or any(a >= b for a, b in itertools.pairwise(scales)):
            raise ValueError(
                f"--config.patchcore.scales={scales}: give one or more, each larger than the one "
                "before"
            )
        if scales[0] < 1 and scales[0] * side < SMALLEST_SCALED:
            raise ValueError(
                f"--config.patchcore.scales={scales}: {scales[0]:g} of data.image_size leaves "
                f"{scales[0] * side:g} px, and the teacher needs {SMALLEST_SCALED}; give a larger "
                "one"
            )

    @classmethod
    def check_run(cls, config, images):
        """Refuses a bank of nearly all patches if statistics by place are learnt from it."""
        if config.score.by_place and config.patchcore.coreset > LARGEST_BANK:
            raise ValueError(
                f"--config.patchcore.coreset={config.patchcore.coreset:g} keeps so many training "
                "patches that these are at no distance from the bank, and --config.score.by_place "
                f"learns from their distances; give at most {LARGEST_BANK:g}, or "
                "score.by_place=False"
            )

    def __init__(self, config):
        """Builds the backbone tapped at `config.patchcore.layers`."""
        super().__init__(config)
        self.teacher = self.backbone(config.patchcore.layers, resizes=True)
        self.width = patch_embedding.embedded_width(self.teacher.channels, config.patchcore.width)
        self._embed = jax.jit(self.embed, static_argnums=2)

    def init(self, key, frozen):
        """Nothing is drawn; the bank comes with `fit`."""
        return {"params": {}}, {}

    def embed(self, frozen: dict, images: jax.Array, scale: float) -> jax.Array:
        """Patch embeddings float32 [b, h, w, d] on the grid of the shallowest layer.

        The teacher sees images `scale` times as large: a small defect fills more of a patch, or a
        patch more of a large one.
        """
        options = self.config.patchcore
        size = patch_embedding.scaled(images.shape[1:3], scale, self.teacher)
        images = self.teacher.normalise(patch_embedding.resize(images, size))
        sizes = options.patch, options.width, options.per_image
        return patch_embedding.embed(self.teacher.apply(frozen["teacher"], images), *sizes)

    def fit(self, variables, frozen, batches, count, key):
        """Fills the bank of every scale with a greedy coreset of the training patches there.

        Raises:
          ValueError: two scales are one, in whole cells; it would count twice.
        """
        scales = by_part(self.config.patchcore.scales)
        size_hw = self.config.data.image_size
        seen = [patch_embedding.scaled(size_hw, scale, self.teacher) for scale in scales.values()]
        if len({*seen}) < len(seen):
            raise ValueError(
                f"--config.patchcore.scales={(*scales.values(),)}: of {size_hw[0]} x {size_hw[1]} "
                f"px these are {', '.join(f'{h} x {w}' for h, w in seen)}; two are the same"
            )
        found = {part: self._fit(frozen, batches, count, key, x) for part, x in scales.items()}
        return {**variables, "memory": found["patches"] if len(found) == 1 else found}

    def _fit(self, frozen, batches, count, key, scale: float) -> dict[str, jax.Array]:
        """The memory of one scale."""
        options = self.config.patchcore
        patches, of_image, candidates = self._training_patches(frozen, batches, count, key, scale)
        memory = {}
        if options.whiten:
            own = jax.random.fold_in(key, count)  # images have the numbers below
            memory["whitening"] = matrix = memory_bank.whitening(patches, options.whiten, own)
            for rows in patches:  # in place: there is no room for two
                rows[:] = rows @ matrix
        everything = patches if options.relative else None
        patches = jnp.asarray(patches[:, :candidates].reshape(-1, self.width))
        if options.coreset_of == "image":
            parts = getattr(batches, "parts", count)  # a list of batches: as many as images
            least = -(-memory_bank.SMALL_BANK // parts)
            each = min(candidates, max(int(options.coreset * of_image), least))
            chosen = memory_bank.coreset_of_each(patches, count, each, key, options.projection)
        else:
            rows = min(max(1, int(options.coreset * count * of_image)), len(patches))
            memory_bank.warn_of_small(rows, len(patches), scale if len(options.scales) > 1 else 0)
            chosen = memory_bank.greedy_coreset(
                patches, rows, key, options.projection, options.start_points
            )
        memory["bank"] = patches[chosen]
        memory["image"] = jnp.asarray(chosen // candidates, jnp.int32)
        if options.relative:
            image = np.asarray(memory["image"])
            memory["expected"] = memory_bank.expected_distances(everything, memory["bank"], image)
        return memory

    def _training_patches(self, frozen, batches, count, key, scale) -> tuple[np.ndarray, int, int]:
        """Patches [count, n, d], of how many in an image, and the first how many are candidates."""
        options = self.config.patchcore
        patches, done, of_image, candidates = None, 0, 0, 0
        for images, real in batches:
            embedded = mesh.gather(self._embed(frozen, images, scale))[:real]
            embedded = embedded.reshape(real, -1, self.width)
            if patches is None:  # one array from the start: there is no room for two
                of_image = embedded.shape[1]
                candidates = min(of_image, -(-options.candidates // count) or of_image)
                wanted = -(-EXPECTING_PATCHES // count) if options.relative else 0
                kept = max(candidates, min(of_image, wanted))
                patches = np.empty((count, kept, self.width), np.float32)
                logging.info(
                    "%d training patches, %d of them candidates, %.1f GiB",
                    *(count * of_image, count * candidates, patches.nbytes / 2**30),
                )
            for i, rows in enumerate(embedded, done):
                drawn = candidates < of_image
                patches[i] = rows[memory_bank.sample(key, i, of_image, kept)] if drawn else rows
            done += real
        return patches, of_image, candidates

    def predict(self, variables, frozen, images, away=None):
        """Squared distance to the nearest bank row, upsampled and smoothed.

        With patchcore.relative the distance is divided by the one to expect from that row. Several
        scales are the parts, and the map is their sum. With patchcore.score=patch the
        score is the maximum of raw distances, as in the official code. The rows of the training
        images in `away` [b, count] do not count, see `leave_out`.
        """
        memory, scales = variables["memory"], by_part(self.config.patchcore.scales)
        parts, raw, size = {}, {}, images.shape[1:3]
        for part, scale in scales.items():
            own = memory if len(scales) == 1 else memory[part]
            raw[part] = memory_bank.distance(own, self.embed(frozen, images, scale), away)
            parts[part] = anomaly_map.upsample_and_smooth(raw[part], size, False, smoothing(scale))
        result = {"map": sum(parts.values()), "parts": parts}
        if self.config.patchcore.score == "patch":
            result["scored"] = sum(anomaly_map.nearest(x, size) for x in raw.values())
        return result

    leave_out = predict  # with the other images' rows, whitening and expected distances as they are

    @classmethod
    def leaves_out_exactly(cls, config):
        """If rows are chosen without a look at other images, and nothing else is learnt of them."""
        own = config.patchcore
        learns = own.whiten or own.relative or own.candidates or config.score.by_place
        return not learns and (own.coreset_of == "image" or own.coreset == 1)

    def torch_scorer(self, variables, frozen):
        """Teacher, embeddings and memory banks in PyTorch."""
        from mmrjax.weights import teachers, torch_scorers  # here: they need the torch extra

        options, size = self.config.patchcore, tuple(self.config.data.image_size)
        arch, sides = self.teacher.arch, (0, 1)
        memory, frozen = jax.device_get((variables["memory"], frozen))
        scales = {}
        for part, scale in by_part(options.scales).items():
            embedding = patch_embedding.in_torch(self.teacher, options, size, scale)
            own = memory if len(options.scales) == 1 else memory[part]
            bank = torch_scorers.Memory(own, memory_bank.BANK_ROWS_PER_CHUNK)
            grid, sigma = embedding.grid, smoothing(scale)
            up = [anomaly_map.operator(grid[i], size[i], False, sigma) for i in sides]
            scales[part] = embedding, bank, up
        state = teachers.to_torch(frozen["teacher"], arch)
        seen = [patch_embedding.scaled(size, x, self.teacher) for x in options.scales]
        teacher = torch_scorers.teacher(state, self.config.teacher.name, self.teacher, seen)
        raw, places = options.score == "patch", jax.device_get(variables.get("places"))
        return torch_scorers.PatchCoreScorer(teacher, scales, raw, size, places)


def by_part(scales: tuple[float, ...]) -> dict[str, float]:
    """{name of a part of the map: its scale}."""
    if len(scales) == 1:
        return {"patches": scales[0]}
    return {f"patches{i}": scale for i, scale in enumerate(scales, 1)}


def smoothing(scale: float) -> float:
    """Sigma of a map's Gaussian, in px of the image or of what the teacher sees: the larger."""
    return anomaly_map.GAUSSIAN_SIGMA / min(1.0, scale)

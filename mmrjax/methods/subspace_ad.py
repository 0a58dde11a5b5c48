"""SubspaceAD (arXiv 2602.23013): distance of teacher patches to the subspace of good ones.

A principal component analysis of good patches, kept up to a share of their variance; a patch's
anomaly is the squared norm of what the subspace leaves of it. No gradients, no memory bank: a mean
and a basis. It is made for few good images (`--config.data.protocol=k_shot`) and a large ViT; the
paper averages blocks 22 to 28 of DINOv2-g with registers at 672 px. Ours: the moments are summed
over batches, so that any number of images fits; layers of unequal channels (a ResNet's) are put
side by side instead of averaged; rotated copies are turned by equal steps; the image score is taken
from the smoothed map, as of all methods here, and not from patches.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mmrjax.methods import anomaly_map, base, patch_embedding
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import mesh

EXACT = jax.lax.Precision.HIGHEST  # a residual is a small difference of large vectors


class SubspaceAD(base.Method):
    """Frozen backbone, principal components of its patches, residual maps."""

    name = "subspace_ad"
    title = "SubspaceAD"
    paper_weights: ClassVar = {"teacher": "dinov2_vitg14_reg4"}
    free = ("optim.", "train.epochs", "train.batch_size", "train.augment", "train.crop_")

    @classmethod
    def defaults(cls):
        """The group `subspace_ad`."""
        own = ConfigDict()
        own.layers = (1, 2, 3)
        own.variance = 0.99  # share of the good patches' variance that the subspace keeps (paper)
        # Turned copies of each training image, 360 / (rotations + 1) degrees apart. The paper's
        # few-shot results take 30; 0 for parts that always lie the same way, or many images.
        own.rotations = 0
        own.score_share = 0.01  # the score is the mean of so much of a map (paper); 0: its maximum
        return ConfigDict({"subspace_ad": own})

    @classmethod
    def check(cls, config):
        """Refuses shares outside 0 to 1 and layers that are named twice."""
        config_lib.check_ranges(
            config,
            ("subspace_ad.layers", 1, 1 << 10),
            ("subspace_ad.variance", 1e-6, 1.0),
            ("subspace_ad.rotations", 0, 359),
            ("subspace_ad.score_share", 0.0, 1.0),
        )
        config_lib.check_different(config, "subspace_ad.layers")

    def __init__(self, config):
        """Builds the backbone tapped at `config.subspace_ad.layers`."""
        super().__init__(config)
        self.teacher = self.backbone(config.subspace_ad.layers, resizes=True)
        self._embed = jax.jit(lambda frozen, x, degrees: self.embed(frozen, turned(x, degrees)))

    def init(self, key, frozen):
        """Nothing is drawn; mean and basis come with `fit`."""
        return {"params": {}}, {}

    def embed(self, frozen: dict, images: jax.Array) -> jax.Array:
        """Patches float32 [b, h, w, d] on the grid of the shallowest layer.

        The mean over layers if all have as many channels, as a ViT's have; otherwise the layers
        side by side.
        """
        size = patch_embedding.scaled(images.shape[1:3], 1.0, self.teacher)
        images = self.teacher.normalise(patch_embedding.resize(images, size))
        features = self.teacher.apply(frozen["teacher"], images)
        grid = features[min(features)].shape[1:3]
        maps = [
            patch_embedding.resize(features[layer].astype(jnp.float32), grid)
            for layer in sorted(features)
        ]
        if len({*self.teacher.channels.values()}) == 1:
            return sum(maps) / len(maps)
        return jnp.concatenate(maps, axis=-1)

    def fit(self, variables, frozen, batches, count, key):
        """The subspace of the training patches, turned copies included, as "subspace"."""
        copies = self.config.subspace_ad.rotations + 1
        rows, total, products = 0, 0.0, 0.0
        for images, real in batches:
            for copy in range(copies):
                degrees = jnp.float32(360.0 * copy / copies)
                patches = mesh.gather(self._embed(frozen, images, degrees))[:real]
                patches = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
                rows, total = rows + len(patches), total + patches.sum(0)
                products = products + patches.T @ patches
        mean = total / rows
        basis = principal_components(
            products / rows - np.outer(mean, mean), self.config.subspace_ad.variance
        )
        logging.info(
            "%d patches of %d images: %d of %d principal components",
            rows,
            count,
            *basis.shape[::-1],
        )
        found = {"mean": jnp.asarray(mean, jnp.float32), "basis": jnp.asarray(basis, jnp.float32)}
        return {**variables, "subspace": found}

    def predict(self, variables, frozen, images):
        """The squared residual of each patch, upsampled and smoothed."""
        own = variables["subspace"]
        distance = residual(self.embed(frozen, images), own["mean"], own["basis"])
        size = images.shape[1:3]
        found = anomaly_map.upsample_and_smooth(distance, size, align_corners=False)
        return {"map": found, "parts": {"residual": found}}

    def score(self, maps):
        """The mean of the highest share of a map."""
        h, w = maps.shape[1:]
        kept = max(1, int(self.config.subspace_ad.score_share * h * w))
        return jax.lax.top_k(maps.reshape(-1, h * w), kept)[0].mean(axis=1)


def principal_components(covariance: np.ndarray, variance: float) -> np.ndarray:
    """The fewest leading eigenvectors that keep a share of the variance.

    Args:
      covariance: float64 [d, d].
      variance: the share, in (0, 1].

    Returns:
      float64 [d, k], orthonormal columns by falling variance; k >= 1.
    """
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values[::-1], 0)
    wanted = values.sum() * (variance - 1e-12)
    kept = min(int(np.searchsorted(np.cumsum(values), wanted)) + 1, len(values))
    return vectors[:, ::-1][:, :kept]


def residual(patches: jax.Array, mean: jax.Array, basis: jax.Array) -> jax.Array:
    """|x - m - B B^T (x - m)|^2 of each patch: float32 [..., d], [d], [d, k] -> [...]."""
    centred = patches - mean
    inside = jnp.matmul(jnp.matmul(centred, basis, precision=EXACT), basis.T, precision=EXACT)
    return jnp.sum((centred - inside) ** 2, axis=-1)


def turned(images: jax.Array, degrees: jax.Array) -> jax.Array:
    """Images turned about their centre, bilinear; what comes from outside is mirrored.

    Args:
      images: float32 [b, h, w, 3].
      degrees: float32 scalar, counter-clockwise.
    """
    h, w = images.shape[1:3]
    angle = jnp.deg2rad(degrees)
    y, x = jnp.meshgrid(jnp.arange(h) - (h - 1) / 2, jnp.arange(w) - (w - 1) / 2, indexing="ij")
    rows = jnp.cos(angle) * y + jnp.sin(angle) * x + (h - 1) / 2
    columns = jnp.cos(angle) * x - jnp.sin(angle) * y + (w - 1) / 2

    def plane(pixels: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(pixels, [rows, columns], 1, mode="mirror")

    per_channel = jax.vmap(jax.vmap(plane), in_axes=-1, out_axes=-1)
    return jax.lax.cond(degrees == 0, lambda x: x, per_channel, images)

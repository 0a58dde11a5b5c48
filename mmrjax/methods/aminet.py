"""AMI-Net (IEEE TASE 2024): hide what looks defective, inpaint it from the rest, and compare.

Features of a frozen teacher are cut into patches. In training random patches are hidden and
predicted. At test time the patches of an image are clustered around centres that a small
transformer makes of the image itself; what lies far from its centre is hidden, so that a defect
cannot help to reconstruct itself. Sections and equations are the paper's; where the official code
(luow23/AMI-Net, MIT) differs, the code is followed, and docs/parity.md says so (rows 28 to 34).
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.methods import anomaly_map, base, losses, optim
from mmrjax.models import aminet, masking, resnet
from mmrjax.models.patches import patchify, unpatchify

STRIDE = 4  # px of an image per cell of the feature map: the stride of the teacher's layer 1
# Eqs. 9 and 15: cosine and squared error (the code's 5 and 1), and the spread of the centres.
WEIGHT_COSINE, WEIGHT_SQUARED, WEIGHT_SPREAD = 5.0, 1.0, 0.1
EXACT = jax.lax.Precision.HIGHEST


class AMINet(base.Method):
    """Frozen backbone, adaptive mask generator, inpainting network, product of two error maps."""

    name = "aminet"
    fields = ("aminet.", "optim.", "train.crop_")
    own: ClassVar = {
        f"{group}.{field}": f"aminet.{field}"
        for group, fields in (
            ("train", ("epochs", "batch_size", "augment")),
            ("optim", ("learning_rate", "weight_decay", "warmup", "drops")),
        )
        for field in fields
    }

    def __init__(self, config):
        """Builds the backbone tapped at `aminet.layers`, and the networks over its features."""
        super().__init__(config)
        options = config.aminet
        step, size = STRIDE * options.patch, tuple(config.data.image_size)
        if any(side % step for side in size):
            near = tuple(max(1, round(side / step)) * step for side in size)
            raise ValueError(
                f"data.image_size={size} must be a multiple of {step} px (aminet.patch="
                f"{options.patch} cells of {STRIDE} px); try {near[0]},{near[1]}"
            )
        arch = resnet.architecture(config.teacher.name)
        layers = tuple(sorted(options.layers))
        self.backbone = resnet.ResNet(arch, layers, self.dtype)
        self.model = aminet.AMINet(
            grid=(size[0] // step, size[1] // step),
            patch_entries=options.patch**2 * sum(arch.channels[layer - 1] for layer in layers),
            width=options.width,
            heads=options.heads,
            depth=options.depth,
            cluster_depth=options.cluster_depth,
            clusters=options.clusters,
            train_mask_token=options.train_mask_token,
            jitter=options.jitter,
            unroll=options.depth if jax.default_backend() == "gpu" else 1,
            dtype=self.dtype,
        )

    @property
    def score_is_peak(self) -> bool:
        """Not for the deviation, which is the code's."""
        return self.config.aminet.score == "max"

    def init(self, key, frozen):
        """Fresh networks."""
        grid, entries = self.model.grid, self.model.patch_entries
        patches = jnp.zeros((1, grid[0] * grid[1], entries))
        return jax.jit(self.model.init)(key, patches, jnp.ones(patches.shape[:2], bool)), {}

    def optimiser(self, steps_per_epoch):
        """AdamW that decays every parameter, biases and tokens too, as torch does by default."""
        config = self.config
        return optim.optimiser(config.optim, config.train.epochs, steps_per_epoch, decayed=None)

    def features(self, frozen: dict, images: jax.Array) -> jax.Array:
        """The feature map of images, float32 [b, h / 4, w / 4, c] (Eq. 1).

        Every layer is resized to the grid of stride 4 and averaged over 3 x 3 cells; the average,
        which the paper does not mention, counts zeros beyond the border.

        Args:
          frozen: from `load_frozen`.
          images: RGB float32 [b, h, w, 3] in [0, 1].
        """
        h, w = (side // STRIDE for side in images.shape[1:3])
        maps = self.backbone.apply(frozen["teacher"], resnet.normalise(images))
        pooled = []
        for _, x in sorted(maps.items()):
            rows = resize_and_pool(x.shape[1], h, self.config.aminet.pool)
            columns = resize_and_pool(x.shape[2], w, self.config.aminet.pool)
            x = x.astype(jnp.float32)
            pooled.append(jnp.einsum("yr,xc,brcd->byxd", rows, columns, x, precision=EXACT))
        return jax.lax.stop_gradient(jnp.concatenate(pooled, axis=-1))

    def loss(self, variables, frozen, batch, key, progress):
        """Reconstruction of all patches, hidden or not, and clustering (Eq. 17)."""
        options = self.config.aminet
        patches = patchify(self.features(frozen, batch["image"]), options.patch)
        n, keys = patches.shape[1], jax.vmap(lambda key: jax.random.split(key, 4))(batch["keys"])
        share = jax.vmap(jax.random.uniform)(keys[:, 0])
        visible = random_visible(share, masking.random_noise(keys[:, 1], n))
        noise = None
        if options.jitter:
            normal = jax.vmap(lambda key: jax.random.normal(key, (n, options.width)))
            noise = normal(keys[:, 2]), normal(keys[:, 3])
        found = self.model.apply(variables, patches, visible, noise)
        loss, logs = total_loss(patches, *found, batch["weight"], options.squared)
        return loss, ({}, logs)

    def predict(self, variables, frozen, images):
        """Hides what is far from its centre, inpaints; the map is a product (Eqs. 16 and 18)."""
        options = self.config.aminet
        features = self.features(frozen, images)
        patches = patchify(features, options.patch)
        tokens, centres = self.model.apply(variables, patches, method="cluster")
        visible = adaptive_visible(distances(tokens, centres, options.squared), options.boundary)
        predicted = self.model.apply(variables, patches, visible, method="inpaint")
        parts = error_maps(
            unpatchify(predicted, self.model.grid, options.patch), features, images.shape[1:3]
        )
        total = parts["length"] * parts["direction"]
        score = anomaly_map.max_score if options.score == "max" else deviation_score
        return {"map": total, "score": score(total), "parts": parts}


@functools.lru_cache(maxsize=64)
def resize_and_pool(n_in: int, n_out: int, pool: int) -> np.ndarray:
    """Linear interpolation with aligned corners, then a mean over `pool` cells; [n_out, n_in].

    The mean counts zeros beyond the border: torch's AvgPool2d with count_include_pad. float32.
    """
    resized = anomaly_map.upsample_matrix(n_in, n_out, align_corners=True)
    near = np.abs(np.subtract.outer(np.arange(n_out), np.arange(n_out))) <= pool // 2
    return (near / pool @ resized).astype(np.float32)


def distances(tokens: jax.Array, centres: jax.Array, squared: bool) -> jax.Array:
    """Length times cosine distance between all pairs (Eq. 12); float32 [b, n, p].

    Args:
      tokens: float32 [b, n, d].
      centres: float32 [b, p, d].
      squared: square the length, as the paper prints; the official code does not.
    """
    u, v = tokens[:, :, None], centres[:, None]
    length = aminet.safe_norm(u - v)  # of differences: |u|^2 - 2 u v + |v|^2 would cancel
    return (length**2 if squared else length) * losses.cosine_distance(u, v)


def cluster_loss(tokens: jax.Array, centres: jax.Array, squared: bool) -> jax.Array:
    """Tokens close to their centres, centres far from each other (Eqs. 13 to 15); float32 [b].

    Means, as in the official code, where the paper prints sums. Arguments as in `distances`.
    """
    p = centres.shape[1]
    within = distances(tokens, centres, squared).min(axis=2).mean(axis=1)
    between = distances(centres, centres, squared).sum(axis=(1, 2)) / (p * p - p)
    return within - WEIGHT_SPREAD * between


def total_loss(
    patches: jax.Array,
    tokens: jax.Array,
    centres: jax.Array,
    predicted: jax.Array,
    weight: jax.Array,
    squared: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training loss (Eqs. 7 to 9, 15 and 17).

    Args:
      patches: float32 [b, n, k], what is to be predicted.
      tokens: float32 [b, n, d], as in `distances`.
      centres: float32 [b, p, d].
      predicted: float32 [b, n, k].
      weight: [b], 0 for padding rows; means run over rows of weight 1.
      squared: as in `distances`.

    Returns:
      (scalar float32, {"loss_cosine", of whole patches; "loss_squared"; "loss_cluster"}).
    """
    parts = {  # [b]
        "cosine": losses.cosine_distance(predicted, patches).mean(axis=1),
        "squared": jnp.mean((predicted - patches) ** 2, axis=(1, 2)),
        "cluster": cluster_loss(tokens, centres, squared),
    }
    total = jnp.maximum(weight.sum(), 1e-9)
    logs = {f"loss_{name}": jnp.sum(x * weight) / total for name, x in parts.items()}
    reconstruction = WEIGHT_COSINE * logs["loss_cosine"] + WEIGHT_SQUARED * logs["loss_squared"]
    return reconstruction + logs["loss_cluster"], logs


def random_visible(share: jax.Array, noise: jax.Array) -> jax.Array:
    """Hides int(n * share) tokens, those of the lowest noise (section III-C); bool [b, n].

    Args:
      share: [b], drawn uniformly from [0, 1) in training: how many is random as well as which.
      noise: [b, n], uniform draws.
    """
    hidden = (noise.shape[1] * share).astype(jnp.int32)
    _, rank = masking.shuffle(noise)
    return rank >= hidden[:, None]


def adaptive_visible(distance: jax.Array, scale: float) -> jax.Array:
    """Hides the tokens that lie on or beyond the boundary of their cluster (Eq. 16); bool [b, n].

    The boundary is the mean of a cluster's distances plus `scale` times their standard deviation
    (divided by count - 1). A cluster of one member hides nothing; one whose members are all equally
    far is hidden whole.

    Args:
      distance: [b, n, p] to every centre; a token belongs to the nearest.
      scale: the paper's lambda.
    """
    cluster, nearest = distance.argmin(axis=2), distance.min(axis=2)  # [b, n]
    member = jax.nn.one_hot(cluster, distance.shape[2])  # [b, n, p]
    count = member.sum(axis=1)  # [b, p]
    mean = jnp.sum(member * nearest[..., None], axis=1) / jnp.maximum(count, 1)
    apart = member * (nearest[..., None] - mean[:, None])
    variance = jnp.sum(apart**2, axis=1) / jnp.maximum(count - 1, 1)
    boundary = jnp.where(count > 1, mean + scale * jnp.sqrt(variance), jnp.inf)  # [b, p]
    return ~(nearest >= jnp.take_along_axis(boundary, cluster, axis=1))


def error_maps(
    predicted: jax.Array, features: jax.Array, size_hw: tuple[int, int]
) -> dict[str, jax.Array]:
    """Squared error and cosine distance per cell, each upsampled and smoothed (Eq. 18).

    The paper prints a length where its code has the mean of the squares.

    Args:
      predicted: float32 [b, h, w, c].
      features: float32 [b, h, w, c].
      size_hw: image size in px.

    Returns:
      {"length", "direction"}: float32 [b, *size_hw].
    """
    cells = {
        "length": jnp.mean((features - predicted) ** 2, axis=-1),
        "direction": losses.cosine_distance(features, predicted),
    }
    return {
        name: anomaly_map.upsample_and_smooth(x, size_hw, align_corners=True)
        for name, x in cells.items()
    }


def deviation_score(maps: jax.Array) -> jax.Array:
    """The score of an image: the standard deviation of its map's pixels; [b, h, w] -> [b]."""
    return maps.std(axis=(1, 2))

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
from ml_collections import ConfigDict

from mmrjax.data import epochs
from mmrjax.methods import anomaly_map, base, clustering, losses, optim
from mmrjax.models import aminet, masking
from mmrjax.models.patches import patchify, unpatchify
from mmrjax.runtime import config as config_lib

STRIDE = 4  # px of an image per cell of the feature map: the stride of the teacher's layer 1
EXACT = jax.lax.Precision.HIGHEST


class AMINet(base.Method):
    """Frozen backbone, adaptive mask generator, inpainting network, product of two error maps."""

    name = "aminet"
    title = "AMI-Net"
    paper_weights: ClassVar = {"teacher": "wide_resnet50_2-95faca4d"}
    published: ClassVar = {"mvtec_ad": {"image_auroc": 99.0}}
    stage_names = ("train",)
    free = (
        *("optim.learning_rate", "optim.weight_decay", "optim.warmup", "optim.drops"),
        *("train.epochs", "train.batch_size", "train.augment"),
    )

    @classmethod
    def defaults(cls):
        """The group `aminet`, with the values of the official code; the paper's are noted."""
        own = ConfigDict()
        own.layers = (1, 2, 3)
        own.pool = 3  # cells averaged in each direction; 1 = none, as in the paper
        own.patch = 4  # side of a token in cells of 4 px (K)
        own.width = 768
        own.heads = 12
        own.depth = 8  # blocks of the inpainting network (N_i)
        own.cluster_depth = 1  # blocks that make the cluster centres (N_s)
        own.clusters = 8  # P
        own.boundary = 0.5  # deviations beyond a cluster's mean that hide a token (lambda)
        own.squared = False  # True: the length in the distance squared, as Eq. 12 prints
        own.jitter = 20.0  # noise on tokens in training, the paper's AMI-Net with ‡; 0 = without
        own.train_mask_token = True  # paper: stays 0
        own.score = "std"  # of an image: std | max of its map
        # AMI-Net reads these in place of the fields of the same name in the groups train and optim.
        own.epochs = 300  # paper: 200
        own.batch_size = 8  # one model on all categories: 16; few shots: 1
        own.augment = "none"
        own.learning_rate = 1e-4  # paper: 1e-3
        own.weight_decay = 0.01  # torch's default, on every parameter
        own.warmup = 0.0
        own.drops = ()
        return ConfigDict({"aminet": own})

    @classmethod
    def check(cls, config):
        """Refuses networks that cannot be built."""
        config_lib.check_choices(
            config,
            {"aminet.augment": ("rrc_flip", "rrc", "none"), "aminet.score": ("std", "max")},
        )
        config_lib.check_ranges(
            config,
            ("aminet.layers", 1, 3),
            ("aminet.pool", 1, 1 << 10),
            ("aminet.patch", 1, 1 << 10),
            ("aminet.width", 4, 1 << 20),
            ("aminet.heads", 1, 1 << 10),
            ("aminet.depth", 1, 1 << 10),
            ("aminet.cluster_depth", 1, 1 << 10),
            ("aminet.clusters", 2, 1 << 20),  # the spread of a single centre is 0 / 0
            ("aminet.boundary", -1e9, 1e9),  # a large one hides nothing
            ("aminet.jitter", 0.0, 1e6),
            ("aminet.epochs", 1, 1 << 40),
            ("aminet.batch_size", 1, 1 << 40),
            ("aminet.learning_rate", 0.0, 10.0),
            ("aminet.warmup", 0.0, 1.0),
            ("aminet.drops", 0.0, 1.0),
        )
        config_lib.check_different(config, "aminet.layers")
        config_lib.check_odd(config, "aminet.pool")

    @classmethod
    def batch_sizes(cls, config):
        """One stage, of its own group."""
        return {config.aminet.batch_size}

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
        self.teacher = self.backbone(options.layers)
        self.model = aminet.AMINet(
            grid=(size[0] // step, size[1] // step),
            patch_entries=options.patch**2 * sum(self.teacher.channels.values()),
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

    def init(self, key, frozen):
        """Fresh networks."""
        grid, entries = self.model.grid, self.model.patch_entries
        patches = jnp.zeros((1, grid[0] * grid[1], entries))
        return jax.jit(self.model.init)(key, patches, jnp.ones(patches.shape[:2], bool)), {}

    def stages(self, records):
        """One stage: AdamW that decays every parameter, biases and tokens too, as torch does."""
        own = self.config.aminet
        plan = epochs.Plan(own.batch_size, batch_field="aminet.batch_size")
        schedule = {k: own[k] for k in ("learning_rate", "weight_decay", "warmup", "drops")}
        fields = ConfigDict({**self.config.optim, **schedule})
        steps = plan.steps_per_epoch(len(records))
        return [
            base.Stage(
                name="train",
                epochs=own.epochs,
                plan=plan,
                tx=optim.optimiser(fields, own.epochs, steps, decayed=None),
                augment=own.augment,
                rates=optim.learning_rates(fields, own.epochs),
                rate_field="aminet.learning_rate",
            )
        ]

    def features(self, frozen: dict, images: jax.Array) -> jax.Array:
        """The feature map of images, float32 [b, h / 4, w / 4, c] (Eq. 1).

        Every layer is resized to the grid of stride 4 and averaged over 3 x 3 cells; the average,
        which the paper does not mention, counts zeros beyond the border.

        Args:
          frozen: from `load_frozen`.
          images: RGB float32 [b, h, w, 3] in [0, 1].
        """
        h, w = (side // STRIDE for side in images.shape[1:3])
        maps = self.teacher.apply(frozen["teacher"], self.teacher.normalise(images))
        pooled = []
        for _, x in sorted(maps.items()):
            rows = resize_and_pool(x.shape[1], h, self.config.aminet.pool)
            columns = resize_and_pool(x.shape[2], w, self.config.aminet.pool)
            x = x.astype(jnp.float32)
            pooled.append(jnp.einsum("yr,xc,brcd->byxd", rows, columns, x, precision=EXACT))
        return jax.lax.stop_gradient(jnp.concatenate(pooled, axis=-1))

    def loss(self, stage, variables, frozen, batch, key, progress):
        """Reconstruction of all patches, hidden or not, and clustering (Eq. 17)."""
        options = self.config.aminet
        patches = patchify(self.features(frozen, batch["image"]), options.patch)
        n, keys = patches.shape[1], jax.vmap(lambda key: jax.random.split(key, 4))(batch["keys"])
        share = jax.vmap(jax.random.uniform)(keys[:, 0])
        visible = clustering.random_visible(share, masking.random_noise(keys[:, 1], n))
        noise = None
        if options.jitter:
            normal = jax.vmap(lambda key: jax.random.normal(key, (n, options.width)))
            noise = normal(keys[:, 2]), normal(keys[:, 3])
        found = self.model.apply(variables, patches, visible, noise)
        loss, logs = clustering.total_loss(patches, *found, batch["weight"], options.squared)
        return loss, ({}, logs)

    def predict(self, variables, frozen, images):
        """Hides what is far from its centre, inpaints; the map is a product (Eqs. 16 and 18)."""
        options = self.config.aminet
        features = self.features(frozen, images)
        patches = patchify(features, options.patch)
        tokens, centres = self.model.apply(variables, patches, method="cluster")
        visible = clustering.adaptive_visible(
            clustering.distances(tokens, centres, options.squared), options.boundary
        )
        predicted = self.model.apply(variables, patches, visible, method="inpaint")
        parts = error_maps(
            unpatchify(predicted, self.model.grid, options.patch), features, images.shape[1:3]
        )
        total = parts["length"] * parts["direction"]
        return {"map": total, "parts": parts}

    def score(self, maps):
        """The map's standard deviation, as in the official code; its maximum by aminet.score."""
        if self.config.aminet.score == "max":
            return super().score(maps)
        return maps.std(axis=(1, 2))


@functools.lru_cache(maxsize=64)
def resize_and_pool(n_in: int, n_out: int, pool: int) -> np.ndarray:
    """Linear interpolation with aligned corners, then a mean over `pool` cells; [n_out, n_in].

    The mean counts zeros beyond the border: torch's AvgPool2d with count_include_pad. float32.
    """
    resized = anomaly_map.upsample_matrix(n_in, n_out, align_corners=True)
    near = np.abs(np.subtract.outer(np.arange(n_out), np.arange(n_out))) <= pool // 2
    return (near / pool @ resized).astype(np.float32)


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

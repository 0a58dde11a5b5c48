"""MALA: a masked autoencoder learns normal images, then draws anomaly maps (IEEE Access 2023).

Stage "reconstruct" paints normal images from a quarter of their patches, while a small network
learns to tell painted from original ones (adversarial.py). Stage "localise" shows whole images with
foreign textures in them to the frozen encoder, and trains the decoder to draw where they are. No
code of the authors is public; docs/mala.md lists the choices that the paper leaves open.
"""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from mmrjax import weights
from mmrjax.data import epochs, tracks
from mmrjax.data.defects import textures
from mmrjax.methods import adversarial, anomaly_map, base, losses, mala_fields, mmr, optim
from mmrjax.models import mae, mala, masking, resnet
from mmrjax.weights import mae_names

PATCH = 16
RECONSTRUCT, LOCALISE = "reconstruct", "localise"
PIXELS = {
    "imagenet": (resnet.IMAGENET_MEAN, resnet.IMAGENET_STD),  # MAE
    "half": ((0.5,) * 3, (0.5,) * 3),  # ViTs of timm's authors
}


class MALA(base.Method):
    """Masked autoencoder, PLPM, TBM; the map is the softmax of two channels."""

    name = "mala"
    title = "MALA"
    paper_weights: ClassVar = {"student": "mae_visualize_vit_large"}
    published: ClassVar = mala_fields.PUBLISHED
    stage_names = (RECONSTRUCT, LOCALISE)
    official = "mae_whole"
    initial = ("mala.init",)
    portable: ClassVar = {"mala.attention": "xla"}
    free = ("mala.pool", "mala.attention")

    @classmethod
    def defaults(cls):
        """The group `mala`."""
        return mala_fields.defaults()

    @classmethod
    def check(cls, config):
        """Refuses values of `mala` that cannot work together."""
        mala_fields.check(config)

    @classmethod
    def batch_sizes(cls, config):
        """Those of the stages that run."""
        sizes = dict(zip(cls.stage_names, config.mala.batch_sizes, strict=True))
        return {sizes[name] for name in mala_fields.stages(config.mala, cls.stage_names)}

    @classmethod
    def weights_needed(cls, config):
        """The autoencoder or the encoder alone; there is no teacher."""
        options = config.mala
        return {
            f"mala {options.init} {options.size}": lambda: weights.student_file(
                options.init, options.size, "mala"
            )
        }

    def __init__(self, config):
        """Builds the networks."""
        super().__init__(config)
        self.options = options = config.mala
        self.grid = mala_fields.grid(config, PATCH)
        width, depth, heads = mmr.student_size(options, "mala")
        self.unroll = depth if jax.default_backend() == "gpu" else 1
        self.autoencoder = mae.MaskedAutoencoder(
            self.grid,
            width,
            depth,
            heads,
            options.decoder_width,
            options.decoder_depth,
            options.decoder_heads,
            options.missing == "zero",
            *PIXELS[options.pixels],
            unroll=self.unroll,
            dtype=self.dtype,
            kernel=mmr.attention_kernel(options.attention, self.dtype, width // heads),
        )
        self.stage_names = mala_fields.stages(options, type(self).stage_names)
        self.plpm, self.tbm = None, None
        if RECONSTRUCT in self.stage_names and options.plpm != "none":
            self.plpm = mala.PseudoLabels(options.plpm_base, self.dtype)
        if LOCALISE in self.stage_names:
            self.tbm = mala.TokenBalance(options.decoder_width, options.tbm, dtype=self.dtype)

    def load_frozen(self):
        """Nothing: what stays frozen is a part of the variables."""
        return {}, {}

    def extras(self, records, labelled):
        """The textures of defects; says which categories are shown more than once an epoch."""
        if few := mala_fields.few(self.options, tracks.part_of(records)):
            logging.info(few)
        if self.tbm is None:
            return {}, {}
        size = tuple(self.config.data.image_size)
        bank, facts = textures.make(self.config.data.textures, size)
        return {"textures": bank}, facts

    def init(self, key, frozen):
        """Drawn networks, or the autoencoder from a file."""
        options, size = self.options, tuple(self.config.data.image_size)
        n, d, e = self.grid[0] * self.grid[1], self.autoencoder.width, options.decoder_width
        keys = jax.random.split(key, 3)
        images = jnp.zeros((2, *size, 3))
        whole = jax.jit(self.autoencoder.init)(keys[0], images)
        whole, facts = weights.init_autoencoder(
            whole, options.init, options.size, self.grid, "mala"
        )
        mala_fields.check_file(options, facts)
        variables = {"params": {"autoencoder": whole["params"]}, "positions": whole["positions"]}
        if self.plpm is not None:
            drawn = jax.jit(self.plpm.init)(keys[1], images)
            variables["params"]["plpm"] = drawn["params"]
            variables["batch_stats"] = drawn["batch_stats"]
        if self.tbm is not None:
            tokens = (jnp.zeros((1, n, width)) for width in (d, d, e))
            drawn = jax.jit(self.tbm.init, static_argnums=4)(keys[2], *tokens, self.grid)
            variables["params"]["tbm"] = drawn["params"]
        return variables, {"student": facts}

    def stages(self, records):
        """Up to two; optimiser state starts anew with the second."""
        plans = mala_fields.plans(self.options, tracks.part_of(records))
        plans = dict(zip(type(self).stage_names, plans, strict=True))
        return [self._stage(name, plans[name], len(records)) for name in self.stage_names]

    def _stage(self, name: str, plan: epochs.Plan, images: int) -> base.Stage:
        plan.check(images)
        options, i = self.options, type(self).stage_names.index(name)
        steps, peak = plan.steps_per_epoch(images), mala_fields.rate(options, i)
        schedule = optax.constant_schedule(peak)
        if name == RECONSTRUCT and options.schedule == "cosine":
            schedule = optim.warm_cosine(peak, options.warmup, options.epochs[i], steps)
        adamw = optax.adamw(
            schedule, 0.9, 0.95, weight_decay=options.weight_decay, mask=optim.decay_mask
        )
        tx, update = adamw, None
        if name == RECONSTRUCT:
            tx, update = {"autoencoder": adamw}, self._update
            if self.plpm is not None:
                tx["plpm"] = optax.adam(options.plpm_rate, 0.5, 0.999)
        first_steps = jnp.arange(options.epochs[i]) * steps
        return base.Stage(
            name=name,
            epochs=options.epochs[i],
            plan=plan,
            tx=tx,
            augment="none",
            rates=np.broadcast_to(np.float32(schedule(first_steps)), (options.epochs[i],)),
            trained=lambda path: self.is_trained(name, path),
            update=update,
            rate_field="mala.learning_rates",
        )

    def is_trained(self, stage: str, path: str) -> bool:
        """Whether a stage trains the parameter at `path`; the encoder is frozen in the second."""
        if stage == RECONSTRUCT:
            unused = "autoencoder/mask_token" if self.autoencoder.zeros else "tbm"
            return not path.startswith(("tbm", unused))
        if path.startswith(("autoencoder/decoder/pixels", "autoencoder/mask_token", "plpm")):
            return False
        frozen = self.options.freeze and not path.startswith("autoencoder/decoder")
        return path.startswith("tbm") or not frozen

    def _update(self, state, frozen, batch, key, progress, tx):
        """A step of PLPM, then one of the autoencoder, on one forward pass of the latter."""
        n = self.grid[0] * self.grid[1]
        order, _ = masking.shuffle(masking.random_noise(batch["keys"], n))
        visible = masking.kept_tokens(n, self.options.mask_ratio)
        positions = state.collections["positions"]
        fixed = state.fixed.get("autoencoder", {})  # the mask token, if zeros stand for it

        def paint(params):
            own = {"params": {**fixed, **params}, "positions": positions}
            return self.autoencoder.apply(own, batch["image"], order, visible)

        return adversarial.update(self.plpm, self.options, paint, state, batch, tx)

    def logits(self, variables: dict, images: jax.Array) -> jax.Array:
        """The map before the softmax, float32 [b, h, w, 2]; channel 0 is "defective"."""
        own = _autoencoder(variables)
        first, last = self.autoencoder.apply(own, images, method="encode")
        decoded = self.autoencoder.apply(own, last, method="decode")
        tokens = first[:, 1:], last[:, 1:], decoded
        return self.tbm.apply({"params": variables["params"]["tbm"]}, *tokens, self.grid)

    def loss(self, stage, variables, frozen, batch, key, progress):
        """The loss of "localise": L1 and focal loss between the map and the drawn defects."""
        anomaly = jax.nn.softmax(self.logits(variables, batch["image"]))[..., 0]
        logs = losses.of_map(anomaly, batch["mask"], batch["weight"])
        total = sum(
            w * part for w, part in zip(self.options.map_weights, logs.values(), strict=True)
        )
        defects = jnp.sum(batch["mask"].any(axis=(1, 2)) * batch["weight"])
        return total, ({}, {**logs, "defects": defects})

    def predict(self, variables, frozen, images):
        """The softmax of the first channel; or what is painted otherwise than it is."""
        if self.tbm is not None:
            anomaly = jax.nn.softmax(self.logits(variables, images))[..., 0]
            return {"map": anomaly, "parts": {"anomaly": anomaly}}
        paint = functools.partial(self.autoencoder.apply, _autoencoder(variables), images)
        error = mae.hidden_error(paint, images, self.grid)
        error = anomaly_map.upsample_and_smooth(error, images.shape[1:3], align_corners=False)
        return {"map": error, "parts": {"error": error}}

    def torch_scorer(self, variables, frozen):
        """The autoencoder under MAE's names, TBM and the score in PyTorch."""
        from mmrjax.weights import torch_mae  # here: it needs the torch extra

        variables = jax.device_get(variables)
        return torch_mae.scorer(
            mae_names.views(_autoencoder(variables)),
            variables["params"].get("tbm"),
            self.grid,
            (self.autoencoder.heads, self.autoencoder.decoder_heads),
            PIXELS[self.options.pixels],
            self.options.pool,
            tuple(anomaly_map.operator(s, s, False) for s in self.config.data.image_size),
            variables.get("places"),
        )

    def score(self, maps):
        """The largest mean of k x k px, k = mala.pool; zeros beyond the border count."""
        return anomaly_map.pooled(maps, self.options.pool).max(axis=(1, 2))


def _autoencoder(variables: dict) -> dict:
    """The part of a method's variables that `mae.MaskedAutoencoder` takes."""
    return {"params": variables["params"]["autoencoder"], "positions": variables["positions"]}

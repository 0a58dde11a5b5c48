"""MMR+: MMR with hybrid attention, synthetic defects to repair, contrast, and aligned domains.

papers/mmr_plus_proposal names four improvements without equations; what is built of each stands in
hybrid_heads.py, data/defects/ and contrast.py. Each is a switch of `config.mmr_plus`, and with all
of them off a step is that of MMR bit for bit. Only the limits of attention change what scores an
image.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from mmrjax.data import epochs, tracks
from mmrjax.data.defects import collect, rows
from mmrjax.methods import contrast, defect_recipe, hybrid_heads, losses, mmr
from mmrjax.models import masking, projection

DOMAINS = 16  # most domains that CORAL keeps moments of
# Folded into a key for what else is drawn: mask and crop stay those of MMR.
NEGATIVES, HEADS = 0x4E, 0x4EAD


class MMRPlus(mmr.MMR):
    """MMR with the switches of `config.mmr_plus`."""

    name = "mmr_plus"
    title = "MMR+"
    published: ClassVar = {}
    official = ""  # PyTorch's student knows no limits of attention

    @classmethod
    def defaults(cls):
        """The group `mmr_plus`, read with the groups student, train and optim."""
        fields = hybrid_heads.defaults() | defect_recipe.defaults() | contrast.defaults()
        return ConfigDict({"mmr_plus": fields})

    @classmethod
    def check(cls, config):
        """Refuses values of `mmr_plus` that cannot work; those of `student` are MMR's to check."""
        hybrid_heads.check(config)
        contrast.check(config)
        defect_recipe.check(config, "mmr_plus")

    def __init__(self, config):
        """Builds MMR, limits what its heads see, and checks that the switches fit together."""
        super().__init__(config)
        self.options = options = config.mmr_plus
        self._check_switches()
        self.student = self.student.clone(hybrid=hybrid_heads.hybrid(options, self.student))
        by_distance = options.heads == "by_distance" or (
            options.heads == "auto" and config.student.init != "scratch"
        )
        if self.student.hybrid is not None and by_distance:
            self.prepare = self._prepare
        self.heads = {}
        if options.contrast == "tokens":
            self.heads["token_head"] = projection.Projection(self.dtype)
        if options.domain == "supcon":
            self.heads["domain_head"] = projection.Projection(self.dtype)

    def _check_switches(self) -> None:
        options, given = self.options, self.options.labelled_target != "blend"
        for name, instead in (("contrast", "none"), ("domain", "coral")):
            if not options.synthetic_every and options[name] not in ("none", "coral"):
                raise ValueError(
                    f"mmr_plus.{name}={options[name]} needs synthetic defects; set "
                    f"mmr_plus.synthetic_every=4, or mmr_plus.{name}={instead}"
                )
        if options.synthetic_every == 1:
            raise ValueError("mmr_plus.synthetic_every=1 leaves no real row; give 0, 2 or more")
        if given and options.defect_folder and options.domain != "none":
            raise ValueError(
                f"mmr_plus.labelled_target={options.labelled_target}: the pictures of "
                "defect_folder are of no known domain; set mmr_plus.domain=none, or "
                "mmr_plus.labelled_target=blend"
            )

    def plan(self, records):
        """Rows for synthetic defects in each batch, and domains in turn if they are aligned."""
        options, names = self.options, self._turns(records)
        on_part, fills = defect_recipe.foreground(options, records)
        return epochs.Plan(
            self.config.train.batch_size,
            defects=defect_recipe.recipe(self.config, "mmr_plus"),
            domain=None if names is None else self._numbered(names),
            foreground=on_part,
            fills=fills,
        )

    def _turns(self, records) -> np.ndarray | None:
        return tracks.turns(
            records, bool(self.options.synthetic_every), self.options.domain != "none"
        )

    def _numbered(self, names: np.ndarray) -> np.ndarray:
        """The number of each image's domain, int32 [n]."""
        domains, index = np.unique(names, return_inverse=True)
        limited = self.options.domain == "coral"
        if len(domains) < 2 or (limited and len(domains) > DOMAINS):
            wanted = f"two to {DOMAINS}" if limited else "two or more"
            raise ValueError(
                f"mmr_plus.domain={self.options.domain} needs training images of {wanted} domains, "
                f"not {len(domains)} (such as {str(domains[0])!r}); set mmr_plus.domain=none"
            )
        return index.astype(np.int32)

    def extras(self, records, labelled):
        """Labelled defects, and how likely each is on a picture of each domain."""
        options = self.options
        if not options.synthetic_every:
            if options.defect_folder or len(labelled):
                logging.warning("mmr_plus.synthetic_every=0: labelled defects are not used")
            return {}, {}
        return collect.collect(
            self.config,
            "mmr_plus",
            records,
            labelled,
            self._turns(records),
            options.domain != "none",
        )

    def init(self, key, frozen):
        """MMR's student with the same initial values, and what the switches need beside it."""
        variables, facts = super().init(key, frozen)
        x, key = jnp.zeros((1, self.student.width)), jax.random.fold_in(key, HEADS)
        params = {name: head.init(key, x)["params"] for name, head in self.heads.items()}
        variables = {**variables, "params": {**variables["params"], **params}}
        if self.student.hybrid is not None:
            kinds = jnp.asarray(self.student.hybrid.kinds, jnp.int32)
            variables["attention"] = {"kinds": kinds}
        if self.options.domain == "coral":
            variables["moments"] = contrast.no_moments(DOMAINS, self.student.width)
        return variables, facts

    def _prepare(self, variables, frozen, batches):
        """Makes those heads local that look least far before training."""
        kinds, facts = hybrid_heads.by_distance(
            self.student, variables, self.teacher.normalise, batches
        )
        changed = {"attention": {"kinds": jnp.asarray(kinds, jnp.int32)}}
        return {**variables, **changed}, {"attention": facts}

    def loss(self, stage, variables, frozen, batch, key, progress):
        """The student sees a defect and predicts the teacher's features of the normal twin."""
        options, collections = self.options, {}
        normal, weight = batch.get("normal", batch["image"]), batch["weight"]
        soft, epoch = self._epochs(options.soft_start), progress["epoch"]
        limits = hybrid_heads.limits(options, self.student, batch, epoch, soft)
        images = self.teacher.normalise(batch["image"])
        features = self._reconstruct(variables, images, batch["keys"], **limits)
        targets = self._targets(frozen, normal)
        if "mask" not in batch or (options.tiny_weight == 1 and "ignored" not in batch):
            loss, logs = losses.multi_scale_cosine(features, targets, weight)
        else:
            loss, logs = contrast.weighted_cosine(
                features,
                targets,
                weight,
                batch["tiny"],
                options.tiny_weight,
                options.tiny_mode == "balanced",
                batch.get("ignored"),
            )
        extra = {}
        if options.contrast == "features":
            extra["contrast"] = self._contrast(frozen, features, targets, batch, key)
        if options.contrast == "tokens":
            extra["contrast"] = self._token_contrast(variables, features, batch)
        if options.domain == "supcon":
            extra["domain"] = self._aligned(variables, features, batch)
        if options.domain == "coral":
            tokens, domain = contrast.pooled(features), batch["domain"]
            moments = contrast.running_moments(variables["moments"], tokens, domain, weight)
            collections["moments"] = jax.lax.stop_gradient(moments)
            extra["domain"] = contrast.coral(moments)
        ramp = contrast.ramp(epoch, *map(self._epochs, options.ramp))
        for name, value in extra.items():
            loss += options[f"{name}_weight"] * ramp * value
            logs[f"loss_{name}"] = value
        kinds = defect_recipe.kinds(self.config, "mmr_plus")
        return loss, (collections, logs | rows.counts(batch, kinds))

    def _targets(self, frozen: dict, images: jax.Array) -> dict:
        """The teacher's features, without gradient."""
        images = self.teacher.normalise(images)
        return jax.lax.stop_gradient(self.teacher.apply(frozen["teacher"], images))

    def _epochs(self, share: float) -> int:
        """A share of the training in whole epochs."""
        return int(share * self.config.train.epochs + 1e-9)

    def unmasked(self, variables, images):
        """Under hard limits of attention."""
        return hybrid_heads.unmasked(self.options, self.student, variables, images)

    def _contrast(self, frozen, features, targets, batch, key) -> jax.Array:
        """InfoNCE between features of the defect and of its normal twin (spec, section 4)."""
        options = self.options

        def defective(x: jax.Array) -> jax.Array:
            return rows.chosen(x, options.synthetic_every)

        loss, _ = contrast.feature_contrast(
            jax.random.fold_in(key, NEGATIVES),
            {layer: defective(features[layer]) for layer in targets},
            {layer: defective(targets[layer]) for layer in targets},
            self._targets(frozen, defective(batch["image"])),
            defective(batch["mask"]),
            defective(batch["ignored"]) if "ignored" in batch else None,
            negatives=options.negatives,
            temperature=options.temperature,
            alike=options.alike,
        )
        return loss

    def _token_contrast(self, variables, features, batch) -> jax.Array:
        """SupCon of visible tokens, with and without a defect in their patch."""
        h, w = (side // self.student.patch for side in batch["image"].shape[1:3])
        is_defective = contrast.cells(batch["mask"], (h, w)).reshape(-1, h * w)  # [b, n]
        student = self.config.student
        if student.mask_form == "drop":
            ids, _ = masking.shuffle(masking.random_noise(batch["keys"], h * w))
            ids = ids[:, : masking.kept_tokens(h * w, student.mask_ratio)]  # [b, k]
            is_defective = jnp.take_along_axis(is_defective, ids, axis=1)  # [b, k]
        g = self.project("token_head", variables, features["latent"][:, 1:])  # [b, k, 128]
        pairs = contrast.token_pairs(is_defective.reshape(-1))
        return contrast.supervised_contrast(
            g.reshape(-1, g.shape[-1]), *pairs, self.options.temperature
        )

    def _aligned(self, variables, features, batch) -> jax.Array:
        """SupCon of whole images across domains (spec, section 5)."""
        g = self.project("domain_head", variables, contrast.pooled(features))  # [b, 128]
        is_defective = batch["mask"].any(axis=(1, 2))  # [b]
        pairs = contrast.domain_pairs(batch["domain"], is_defective, batch["weight"])
        return contrast.supervised_contrast(g, *pairs, self.options.temperature)

    def project(self, name: str, variables: dict, x: jax.Array) -> jax.Array:
        """[..., d] through one of `heads`, float32 [..., 128] of unit length."""
        return self.heads[name].apply({"params": variables["params"][name]}, x)

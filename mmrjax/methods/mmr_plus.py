"""MMR+: MMR with hybrid attention, synthetic defects to repair, contrast, and aligned domains.

papers/mmr_plus_proposal names four improvements without equations; what is built of each stands in
models/attention.py, data/defects.py and losses_plus.py. Each is a switch of `config.mmr_plus`, and
with all of them off a step is that of MMR bit for bit. Nothing is added to what scores an image but
the limits of attention.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mmrjax.data import epochs, geometry, tracks
from mmrjax.data.defects import bank, synthesise
from mmrjax.data.defects import labelled as labelled_pictures
from mmrjax.methods import contrast, losses, mmr
from mmrjax.models import attention, masking, resnet, vit
from mmrjax.runtime import mesh

SOFT = 30.0  # the penalty at the end of the soft start, from 0
GATHER_FROM = 784  # patches; below, masking all pairs is no slower
SAMPLED = 0.25  # share of patches that global heads see under "random"
DOMAINS = 16  # most domains that CORAL keeps moments of
# What else is drawn, folded into an example's or a step's key: mask and crop stay those of MMR.
DEFECT, SAMPLE, NEGATIVES, HEADS, LABELLED = 0xDEF, 0x5A, 0x4E, 0x4EAD, 0x1AB


class Head(nn.Module):
    """The projection that contrasts are trained in, d-256-128 to unit length; unused in tests."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., d] -> float32 [..., 128]."""
        x = nn.Dense(256, dtype=self.dtype, kernel_init=vit.xavier, name="fc1")(x)
        x = nn.Dense(128, dtype=self.dtype, kernel_init=vit.xavier, name="fc2")(nn.relu(x))
        return contrast.unit(x.astype(jnp.float32))


class MMRPlus(mmr.MMR):
    """MMR with the switches of `config.mmr_plus`."""

    name = "mmr_plus"
    fields = (*mmr.MMR.fields, "mmr_plus.")

    def __init__(self, config):
        """Builds MMR, limits what its heads see, and checks that the switches fit together."""
        super().__init__(config)
        self.options = options = config.mmr_plus
        self._check()
        self.student = self.student.clone(hybrid=self._hybrid())
        limited = self.student.hybrid is not None
        by_distance = options.heads == "by_distance" or (
            options.heads == "auto" and config.student.init != "scratch"
        )
        self.prepares = limited and by_distance
        self.settings = synthesise.DefectSettings(
            kinds=tuple(options.defect_kinds),
            tiny_share=options.defect_tiny,
            noise_intensity=options.noise_intensity,
            spatial_distribution=options.spatial_distribution,
        )
        self.heads = {}
        if options.contrast == "tokens":
            self.heads["token_head"] = Head(self.dtype)
        if options.domain == "supcon":
            self.heads["domain_head"] = Head(self.dtype)

    def _check(self) -> None:
        options, batch = self.options, self.config.train.batch_size
        epochs.Plan(batch, options.synthetic_every)
        if options.labelled_target != "blend":
            self._check_labelled()
        if options.synthetic_every:
            return
        if options.contrast != "none":
            raise ValueError(
                f"mmr_plus.contrast={options.contrast} needs synthetic defects; set "
                "mmr_plus.synthetic_every=4, or mmr_plus.contrast=none"
            )
        if options.domain == "supcon":
            raise ValueError(
                "mmr_plus.domain=supcon needs synthetic defects to tell good ones from; set "
                "mmr_plus.synthetic_every=4, or mmr_plus.domain=coral"
            )

    def _check_labelled(self) -> None:
        options, target = self.options, self.options.labelled_target
        if not (self.config.data.labelled or options.defect_folder):
            raise ValueError(
                f"mmr_plus.labelled_target={target}: there are no labelled defects; set "
                "mmr_plus.defect_folder, or data.labelled=true (protocol track_b)"
            )
        if options.defect_folder and options.domain != "none":
            raise ValueError(
                f"mmr_plus.labelled_target={target}: the pictures of defect_folder are of no known "
                "domain; set mmr_plus.domain=none, or mmr_plus.labelled_target=blend"
            )

    def _hybrid(self) -> attention.Hybrid | None:
        """What `config.mmr_plus` lets the heads see; None: everything."""
        options, model = self.options, self.student
        if not options.hybrid:
            return None
        far = attention.FULL if options.sampling == "full" else attention.GLOBAL
        local = int(options.local_heads * model.heads + 1e-9)
        kinds = attention.fixed_kinds(model.depth, model.heads, local, options.layers, far)
        return attention.Hybrid(kinds, options.window, options.stride)

    def plan(self, records, indices):
        """Rows for synthetic defects in each batch, and domains in turn where they are aligned."""
        every, names = self.options.synthetic_every, self._domain_names(records, indices)
        domain = None if names is None else self._numbered(names)
        on_part, fills = bool(every) and self.options.foreground == "otsu", None
        if on_part and self.options.surfaces:
            sets = [str(part).split("/")[0] for part in tracks.part_of(records)[indices]]
            fills = np.isin(sets, self.options.surfaces)
        plan = epochs.Plan(self.config.train.batch_size, every, domain, on_part, fills)
        plan.table(len(indices), 0, 0)  # refuses too few images before anything is compiled
        return plan

    def _domain_names(self, records, indices) -> np.ndarray | None:
        """What each image shares its turn in a batch with, str [n]; None: no turns.

        The data set, of several joined ones. Of a single one its domain, where those are aligned.
        """
        parts = tracks.part_of(records)[indices]
        if len(np.unique(parts)) > 1 and (
            self.options.synthetic_every or self.options.domain != "none"
        ):
            return parts
        return None if self.options.domain == "none" else records.table["domain"][indices]

    def _numbered(self, names: np.ndarray) -> np.ndarray:
        """The number of each image's domain, int32 [n]."""
        options = self.options
        domains, index = np.unique(names, return_inverse=True)
        if len(domains) < 2:
            raise ValueError(
                f"mmr_plus.domain={options.domain} needs training images of two or more domains; "
                f"all {len(names)} are of {str(domains[0])!r}; set mmr_plus.domain=none"
            )
        if options.domain == "coral" and len(domains) > DOMAINS:
            raise ValueError(
                f"mmr_plus.domain=coral takes up to {DOMAINS} domains, there are {len(domains)}"
            )
        return index.astype(np.int32)

    def keep_labelled(self, records, labelled, indices):
        """Labelled defects, and how likely each is on a picture of each domain."""
        folder, whole = self.options.defect_folder, self.options.labelled_target != "blend"
        if (folder or len(labelled)) and not self.options.synthetic_every:
            logging.warning("mmr_plus.synthetic_every=0: labelled defects are not used")
        if not (len(labelled) or folder) or not self.options.synthetic_every:
            return {}, {}
        view, found = geometry.View.of(self.config), []
        if len(labelled):
            found.append(bank.from_records(records, labelled, view, whole))
        if found == [None]:
            fits = "" if whole else " that is small enough to be cut out"
            raise ValueError(
                f"data.labelled: none of the {len(labelled)} defective training images has a "
                f"defect with pixel truth{fits}; set data.labelled=false"
            )
        if folder:
            try:
                found.append(bank.from_folder(folder, view, whole))
            except ValueError as e:
                raise ValueError(f"--config.mmr_plus.defect_folder: {e}") from e
        found = bank.joined(found)
        parts, names = tracks.part_of(records)[indices], self._domain_names(records, indices)
        first = [0] if names is None else np.unique(names, return_index=True)[1]
        if not whole:
            kept = {**found.bank._asdict(), "chances": found.chances(parts[first])}
            facts = {"labelled_defects": found.counts(), "labelled_too_large": found.left_out}
            return {"labelled": kept}, facts
        # Each picture is of a domain of its own already, and takes its turn.
        one_set = self.options.domain != "none" and len(np.unique(parts)) == 1
        return self._keep_whole(found, parts[first], names[first] if one_set else None)

    def _keep_whole(self, found, parts, domains) -> tuple[dict, dict]:
        """What `keep_labelled` returns of pictures as they are."""
        target = self.options.labelled_target
        known, pictures = labelled_pictures.targets(target, *found.bank)
        if not known.any():
            raise ValueError(
                f"mmr_plus.labelled_target={target}: the defects of all {len(known)} labelled "
                "pictures fill them; set mmr_plus.labelled_target=blend"
            )
        found = found.only(known)
        facts = {"labelled_pictures": found.counts(), "labelled_left_out": found.left_out}
        kept = {**found.bank._asdict(), **pictures, "chances": found.chances(parts, domains)}
        return {"labelled": kept}, facts

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

    def prepare(self, variables, frozen, batches):
        """Makes those heads local that look least far before training."""

        @jax.jit
        def distances(variables, pixels):
            images = resnet.normalise(pixels / 255.0)
            _, kept = self.student.apply(variables, images, penalty=0.0, mutable="intermediates")
            # [depth, b, 1 + n, heads, c] each.
            (pair,) = kept["intermediates"]["encoder"]["blocks"]["attn"]["queries_keys"]
            grid = tuple(side // self.student.patch for side in images.shape[1:3])
            found = jax.lax.map(lambda qk: attention.mean_distances(*qk, grid), pair)
            return jnp.moveaxis(found, 1, 0)  # [b, depth, heads]

        found = [mesh.gather(distances(variables, x))[:real] for x, real in batches]
        mean = np.concatenate(found).mean(axis=0)  # [depth, heads]
        kinds = attention.shortest_local(mean, np.asarray(self.student.hybrid.kinds))
        local = [np.flatnonzero(row == attention.LOCAL).tolist() for row in kinds]
        facts = {"local_heads": local, "mean_distances": np.round(mean, 3).tolist()}
        changed = {"attention": {"kinds": jnp.asarray(kinds, jnp.int32)}}
        return {**variables, **changed}, {"attention": facts}

    def loss(self, variables, frozen, batch, key, progress):
        """The student sees a defect and predicts the teacher's features of the normal twin."""
        options, collections = self.options, {}
        normal, found, ignored = batch["image"], None, None
        seen = normal
        if options.synthetic_every:
            found = self._synthesise(batch, frozen.get("labelled"))
            if options.labelled_target != "blend" and "labelled" in frozen:
                found, twins, unknown = self._show_labelled(batch, found, frozen["labelled"])
                normal = self._with_synthetic(normal, twins)
                ignored = self._with_synthetic(jnp.zeros(normal.shape[:3], bool), unknown)
            seen = self._with_synthetic(normal, found.images)
        limits = self._limits(batch, progress["epoch"])
        features = self._reconstruct(variables, resnet.normalise(seen), batch["keys"], **limits)
        targets = self._targets(frozen, normal)
        weight = batch["weight"]
        if found is None or (options.tiny_weight == 1 and ignored is None):
            loss, logs = losses.multi_scale_cosine(features, targets, weight)
        else:
            tiny = self._with_synthetic(jnp.zeros(normal.shape[:3], bool), found.tiny)
            loss, logs = contrast.weighted_cosine(
                features,
                targets,
                weight,
                tiny,
                options.tiny_weight,
                options.tiny_mode == "balanced",
                ignored,
            )
        extra = {}
        if options.contrast == "features":
            unknown = None if ignored is None else self._synthetic(ignored)
            extra["contrast"] = self._contrast(frozen, features, targets, found, unknown, key)
        if options.contrast == "tokens":
            extra["contrast"] = self._token_contrast(variables, features, found, batch)
        if options.domain == "supcon":
            extra["domain"] = self._aligned(variables, features, found, batch)
        if options.domain == "coral":
            moments = self._moments(variables, features, batch)
            collections["moments"] = jax.lax.stop_gradient(moments)
            extra["domain"] = contrast.coral(moments)
        for name, value in extra.items():
            loss += options[f"{name}_weight"] * self._ramp(progress["epoch"]) * value
            logs[f"loss_{name}"] = value
        if found is not None:
            kinds = jnp.arange(len(synthesise.KINDS)) == found.kind[:, None]
            drawn = zip(synthesise.KINDS, kinds.sum(0).astype(jnp.float32), strict=True)
            logs |= {f"defects_{name}": count for name, count in drawn if self._draws(name)}
            logs["defects"] = kinds.sum().astype(jnp.float32)
        return loss, (collections, logs)

    def _draws(self, kind: str) -> bool:
        """Whether defects of a kind can come."""
        options, settings = self.options, self.settings
        real = self.config.data.labelled or options.defect_folder
        return kind in settings.kinds or (kind == "real" and bool(real))

    def _targets(self, frozen: dict, images: jax.Array) -> dict:
        """The teacher's features, without gradient."""
        images = resnet.normalise(images)
        return jax.lax.stop_gradient(self.teacher.apply(frozen["teacher"], images))

    def _synthetic(self, x: jax.Array) -> jax.Array:
        """The rows of a batch that become synthetic ones."""
        every = self.options.synthetic_every
        return x.reshape(-1, every, *x.shape[1:])[:, 0]

    def _with_synthetic(self, x: jax.Array, rows: jax.Array) -> jax.Array:
        """A batch with the synthetic rows replaced."""
        groups = x.reshape(-1, self.options.synthetic_every, *x.shape[1:])
        return jnp.concatenate([rows[:, None], groups[:, 1:]], axis=1).reshape(x.shape)

    def _synthesise(self, batch: dict, labelled: dict | None = None) -> synthesise.Defects:
        """Defects on every so-many-th picture of the batch, crop and flip done; in [0, 1]."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self._synthetic(batch["keys"]), DEFECT)
        normal = self._synthetic(batch["image"])
        pictures = jnp.round(255 * normal)
        where = self._synthetic(batch["foreground"]) if "foreground" in batch else None
        if labelled is None or self.options.labelled_target != "blend":
            found = synthesise.synthesise(keys, pictures, where, self.settings)
        else:
            domain = batch.get("domain", jnp.zeros(len(batch["image"]), jnp.int32))
            found = synthesise.synthesise(
                keys,
                pictures,
                where,
                dataclasses.replace(
                    self.settings,
                    kinds=(*self.settings.kinds, "real"),
                    real_share=self.options.defect_labelled,
                ),
                synthesise.Bank(labelled["images"], labelled["masks"]),
                labelled["chances"][self._synthetic(domain)],
            )
        # Added as a difference: what is not blended stays the same bit for bit.
        return found._replace(images=normal + (found.images - pictures) / 255)

    def _show_labelled(self, batch: dict, found: synthesise.Defects, labelled: dict) -> tuple:
        """Labelled pictures in some of the synthetic rows: see `labelled_pictures.show`."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self._synthetic(batch["keys"]), LABELLED)
        domain = batch.get("domain", jnp.zeros(len(batch["image"]), jnp.int32))
        chances = labelled["chances"][self._synthetic(domain)]
        share = self.options.defect_labelled
        rows = labelled_pictures.draw(keys, labelled, chances, share, self.config)
        return labelled_pictures.show(rows, self._synthetic(batch["image"]), found)

    def _epochs(self, share: float) -> int:
        """A share of the training in whole epochs."""
        return int(share * self.config.train.epochs + 1e-9)

    def _ramp(self, epoch: jax.Array) -> jax.Array:
        return contrast.ramp(epoch, *map(self._epochs, self.options.ramp))

    def _limits(self, batch: dict, epoch: jax.Array) -> dict:
        """How hard the limits of attention are now, and the keys of global heads if random."""
        if self.student.hybrid is None:
            return {}
        limits, last = {}, self._epochs(self.options.soft_start)
        if last:
            limits["penalty"] = jnp.where(epoch < last, SOFT * epoch / last, attention.HARD)
        if self.options.sampling == "random":
            limits["sample"] = self._sample(batch["keys"], batch["image"].shape)
        return limits

    def _sample(self, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A quarter of the patches of each key's image, bool [b, n]."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, SAMPLE)
        n = shape[1] // self.student.patch * (shape[2] // self.student.patch)
        _, rank = masking.shuffle(masking.random_noise(keys, n))
        return rank < math.ceil(SAMPLED * n)

    def whole(self, variables, images):
        """With hard limits; random keys are drawn once and for all."""
        limits, model = {}, self.student
        if model.hybrid is not None and self.options.sampling == "random":
            limits["sample"] = self._sample(jax.random.split(jax.random.key(0), 1), images.shape)
        if self._gathers(images.shape):
            model = model.clone(hybrid=dataclasses.replace(model.hybrid, gather=True))
        return model.apply(variables, images, **limits)

    def _gathers(self, shape: tuple[int, ...]) -> bool:
        """Whether keys are collected: on large grids, where it is possible (see `Hybrid`)."""
        n = shape[1] // self.student.patch * (shape[2] // self.student.patch)
        possible = self.options.sampling == "lattice" and self.options.layers == "all"
        return self.student.hybrid is not None and possible and n >= GATHER_FROM

    def _contrast(self, frozen, features, targets, found, ignored, key) -> jax.Array:
        """InfoNCE between features of the defect and of its normal twin (spec, section 4)."""
        student, normal = (
            {layer: self._synthetic(maps[layer]) for layer in targets}
            for maps in (features, targets)
        )
        options, key = self.options, jax.random.fold_in(key, NEGATIVES)
        defective = self._targets(frozen, found.images)
        loss, _ = contrast.feature_contrast(
            key,
            student,
            normal,
            defective,
            found.mask,
            ignored,
            negatives=options.negatives,
            temperature=options.temperature,
            alike=options.alike,
        )
        return loss

    def _token_contrast(self, variables, features, found, batch) -> jax.Array:
        """SupCon of visible tokens, with and without a defect in their patch."""
        h, w = (side // self.student.patch for side in batch["image"].shape[1:3])
        mask = self._with_synthetic(jnp.zeros(batch["image"].shape[:3], bool), found.mask)
        is_defective = contrast.cells(mask, (h, w)).reshape(-1, h * w)
        student = self.config.student
        if student.mask_form == "drop":
            ids, _ = masking.shuffle(masking.random_noise(batch["keys"], h * w))
            ids = ids[:, : masking.kept_tokens(h * w, student.mask_ratio)]
            is_defective = jnp.take_along_axis(is_defective, ids, axis=1)
        g = self.project("token_head", variables, features["latent"][:, 1:])
        pairs = contrast.token_pairs(is_defective.reshape(-1))
        return contrast.supervised_contrast(
            g.reshape(-1, g.shape[-1]), *pairs, self.options.temperature
        )

    def _aligned(self, variables, features, found, batch) -> jax.Array:
        """SupCon of whole images across domains (spec, section 5)."""
        g = self.project("domain_head", variables, pooled(features))
        is_defective = found.mask.any(axis=(1, 2))
        is_defective = self._with_synthetic(jnp.zeros(len(g), bool), is_defective)
        pairs = contrast.domain_pairs(batch["domain"], is_defective, batch["weight"])
        return contrast.supervised_contrast(g, *pairs, self.options.temperature)

    def _moments(self, variables, features, batch) -> dict:
        """The domains' moments of pooled tokens, this batch included."""
        tokens, domain = pooled(features), batch["domain"]
        return contrast.running_moments(variables["moments"], tokens, domain, batch["weight"])

    def project(self, name: str, variables: dict, x: jax.Array) -> jax.Array:
        """[..., d] through one of `heads`, float32 [..., 128] of unit length."""
        return self.heads[name].apply({"params": variables["params"][name]}, x)


def pooled(features: dict) -> jax.Array:
    """The mean of the visible tokens, float32 [b, d]."""
    return features["latent"][:, 1:].astype(jnp.float32).mean(axis=1)

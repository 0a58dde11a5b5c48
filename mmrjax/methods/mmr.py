"""MMR: masked multi-scale reconstruction (arXiv 2304.02216).

A student that sees 60 % of the patches predicts the features of a frozen teacher at three scales;
where the two disagree on a test image, there is a defect.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mmrjax import weights
from mmrjax.data import epochs
from mmrjax.methods import anomaly_map, base, losses, optim
from mmrjax.models import masking, student
from mmrjax.runtime import config as config_lib
from mmrjax.runtime import devices

# ViT sizes: width, depth, heads (Dosovitskiy et al. 2021, Touvron et al. 2021).
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


class MMR(base.Method):
    """Teacher, masked student, multi-scale cosine loss, summed cosine maps."""

    name = "mmr"
    title = "MMR"
    paper_weights: ClassVar = {
        "teacher": "wide_resnet50_2-95faca4d",
        "student": "mae_visualize_vit_base",
    }
    published: ClassVar = {"aebad/s": {"image_auroc": 84.7, "pro_mmr": 89.1}}  # arXiv 2304.02216
    stage_names = ("train",)
    official = "mmr"
    free = ("student.attention", "student.unroll")
    initial = ("student.init",)
    portable: ClassVar = {"student.attention": "xla"}

    @classmethod
    def defaults(cls):
        """The group `student`, with the values of the official code."""
        student = ConfigDict()
        student.size = "base"  # tiny | small | base | large, or "" with width, depth, heads given
        student.width = 0  # 0 = from size
        student.depth = 0
        student.heads = 0
        student.init = "mae"  # mae | scratch | a file
        student.layers = (1, 2, 3)  # which teacher layers to reconstruct (paper, table 9)
        student.mask_ratio = 0.4  # paper, figure 13
        student.mask_form = "drop"  # drop (tokens never enter) | pixel (units set to mean colour)
        student.mask_unit = 16  # side of such a unit in px: 1, 2, 4, … 112 (paper, figure 12)
        # Kernel of plain attention: xla | cudnn (flash, NVIDIA in bfloat16) | auto (cudnn there)
        student.attention = "auto"
        student.unroll = 0  # transformer blocks per scan iteration; 0 = by platform
        return ConfigDict({"student": student})

    @classmethod
    def check(cls, config):
        """Refuses masks, layers and kernels that do not exist."""
        config_lib.check_choices(
            config,
            {"student.mask_form": ("drop", "pixel"), "student.attention": ("auto", "xla", "cudnn")},
        )
        config_lib.check_ranges(
            config,
            ("student.mask_ratio", 0.0, 0.99),
            ("student.mask_unit", 1, 1 << 20),
            ("student.layers", 1, 3),
        )
        config_lib.check_different(config, "student.layers")

    @classmethod
    def batch_sizes(cls, config):
        """One stage, of config.train."""
        return {config.train.batch_size}

    @classmethod
    def weights_needed(cls, config):
        """Teacher and student."""
        student = config.student
        return super().weights_needed(config) | {
            f"student {student.init} {student.size}": lambda: weights.student_file(
                student.init, student.size
            )
        }

    def __init__(self, config):
        """Builds the student that `config.student` describes, with the teacher's channel widths."""
        super().__init__(config)
        if config.student.mask_form == "pixel":  # before anything is loaded or compiled
            masking.unit_grid(tuple(config.data.image_size), config.student.mask_unit)
        layers = tuple(config.student.layers)
        self.teacher = self.backbone(layers)
        if wrong := {k: v for k, v in self.teacher.strides.items() if v != 2 ** (k + 1)}:
            layer, stride = next(iter(wrong.items()))
            raise ValueError(
                f"teacher {config.teacher.name}: layer {layer} has a stride of {stride} px; the "
                f"student's pyramid has layers 1, 2, 3 at 4, 8, 16 px; give other teacher.taps, "
                "or a ResNet or EfficientNet teacher"
            )
        width, depth, heads = student_size(config.student)
        on_gpu = jax.default_backend() == "gpu"
        self.student = student.MaskedStudent(
            width=width,
            depth=depth,
            heads=heads,
            channels=dict(self.teacher.channels),
            unroll=config.student.unroll or (depth if on_gpu else 1),
            dtype=self.dtype,
            kernel=attention_kernel(config.student.attention, self.dtype, width // heads),
        )
        self.unroll = self.student.unroll

    def init(self, key, frozen):
        """Fresh or pretrained student."""
        images = jax.ShapeDtypeStruct((1, *self.config.data.image_size, 3), "float32")
        variables = jax.jit(lambda key: self.student.init(key, jax.numpy.zeros(images.shape)))(key)
        grid = tuple(side // self.student.patch for side in self.config.data.image_size)
        variables, facts = weights.init_student(
            variables, self.config.student.init, self.config.student.size, grid
        )
        return variables, {"student": facts}

    def plan(self, records):
        """How batches of the training images are filled."""
        return epochs.Plan(self.config.train.batch_size)

    def stages(self, records):
        """One stage, "train": AdamW on all parameters by the groups `train` and `optim`."""
        config, plan = self.config, self.plan(records)
        plan.check(len(records))
        steps = plan.steps_per_epoch(len(records))
        return [
            base.Stage(
                name="train",
                epochs=config.train.epochs,
                plan=plan,
                tx=optim.optimiser(config.optim, config.train.epochs, steps),
                augment=config.train.augment,
                rates=optim.learning_rates(config.optim, config.train.epochs),
            )
        ]

    def loss(self, stage, variables, frozen, batch, key, progress):
        """The sum over scales of 1 - cosine, over all locations (Eq. 1)."""
        images = self.teacher.normalise(batch["image"])
        features = self._reconstruct(variables, images, batch["keys"])
        targets = jax.lax.stop_gradient(self.teacher.apply(frozen["teacher"], images))
        loss, logs = losses.multi_scale_cosine(features, targets, batch["weight"])
        return loss, ({}, logs)

    def _reconstruct(self, variables: dict, images: jax.Array, keys: jax.Array, **limits) -> dict:
        """Features of masked images; each image's mask depends on its own key alone.

        `limits` of hybrid attention go to the student as they are.
        """
        options = self.config.student
        unit = options.mask_unit if options.mask_form == "pixel" else self.student.patch
        h, w = images.shape[1:3]
        noise = masking.random_noise(keys, (h // unit) * (w // unit))
        if options.mask_form == "pixel":  # every token enters: nothing for the mask token to do
            hidden = masking.hide_units(images, noise, unit, options.mask_ratio)
            return self.student.apply(variables, hidden, **limits)
        return self.student.apply(variables, images, noise, options.mask_ratio, **limits)

    def unmasked(self, variables: dict, images: jax.Array) -> dict:
        """Features of images of which nothing is masked."""
        return self.student.apply(variables, images)

    def predict(self, variables, frozen, images):
        """Unmasked; the map is the sum of the scales' maps (Eq. 2)."""
        size = images.shape[1:3]
        images = self.teacher.normalise(images)
        features = self.unmasked(variables, images)
        targets = self.teacher.apply(frozen["teacher"], images)
        parts = anomaly_map.cosine_maps(features, targets, size)
        total = sum(parts.values())
        return {"map": total, "parts": parts}

    def torch_scorer(self, variables, frozen):
        """Teacher and student in PyTorch; ValueError if heads see a part of the image each."""
        from mmrjax.weights import teachers, torch_scorers, torch_twin  # here: the torch extra

        if "attention" in variables:
            raise ValueError("hybrid attention has no PyTorch form; use --output=….jax")
        variables, frozen = jax.device_get((variables, frozen))
        size, names = tuple(self.config.data.image_size), weights.torch_names
        grid = tuple(side // self.student.patch for side in size)
        state = torch_scorers.tensors(names.student_to_torch(variables, grid))
        header = {"heads": self.student.heads, "image_size": "{},{}".format(*size)}
        teacher = teachers.to_torch(frozen["teacher"], self.teacher.arch)
        return torch_scorers.MMRScorer(
            torch_scorers.teacher(teacher, self.config.teacher.name, self.teacher, [size]),
            torch_twin.student_of(state, header),
            {
                f"layer{n}": [anomaly_map.operator(side >> (n + 1), side, True) for side in size]
                for n in self.teacher.layers
            },
            self.config.student.mask_ratio,
            variables.get("places"),
        )


def _has_flash_attention() -> bool:
    """Whether cuDNN's flash attention runs here: on NVIDIA from Ampere on."""
    return devices.on_nvidia() and float(jax.devices()[0].compute_capability) >= 8.0


def attention_kernel(name: str, dtype: jnp.dtype, head_width: int) -> str:
    """Resolves config.student.attention: "auto" is cuDNN where that can run, else XLA.

    Raises:
      ValueError: an unknown name, or cuDNN where it cannot run.
    """
    fits = dtype == jnp.bfloat16 and head_width % 8 == 0 and head_width <= 128
    can = fits and _has_flash_attention()
    if name == "cudnn" and not can:
        raise ValueError(
            "student.attention=cudnn needs an NVIDIA GPU of compute capability 8.0 or more, "
            "train.compute_dtype=bfloat16, and for width / heads a multiple of 8 up to 128 "
            f"(here {head_width}); use xla or auto"
        )
    return "cudnn" if can and name != "xla" else "xla"


def student_size(config, group: str = "student") -> tuple[int, int, int]:
    """(width, depth, heads) of a group: those of `size`, each replaced when given."""
    if config.size and config.size not in SIZES:
        raise ValueError(f"unknown {group}.size={config.size!r}; available: {sorted(SIZES)} or ''")
    default = SIZES.get(config.size, (0, 0, 0))
    size = tuple(
        given or value
        for given, value in zip((config.width, config.depth, config.heads), default, strict=True)
    )
    if not all(size):
        raise ValueError(f"{group}.size='' needs {group}.width, {group}.depth and {group}.heads")
    return size

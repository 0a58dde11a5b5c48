"""The fields of MALA, what the paper says of them, and its published scores."""

import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import epochs
from mmrjax.data.defects import perlin
from mmrjax.runtime import config as config_lib

BASE_RATE = 1e-3  # paper: times batch size / 256

# Tables 1 and 3: image / pixel AUROC of one model for all 27 categories.
_MVTEC = """bottle 100/96.9 cable 97.3/93.1 capsule 97.8/92.9 carpet 98.4/98.2 grid 100/99.3
hazelnut 99.2/99.4 leather 100/99.5 metal_nut 100/97.4 pill 99.3/98.2 screw 95.6/93.4 tile 99.2/99.3
toothbrush 99.7/99.4 transistor 95.6/91.7 wood 97.5/97.9 zipper 100/99.2 all 98.6/97.1"""
_VISA = """pcb1 91.9/91.6 pcb2 85.5/97.6 pcb3 94.9/99.5 pcb4 98.8/98.2 macaroni1 98.5/97.2
macaroni2 85.0/96.6 capsules 90.1/93.8 candle 88.3/94.4 cashew 95.7/99.1 chewinggum 96.1/99.0
fryum 96.9/99.1 pipe_fryum 94.9/99.7 all 93.0/97.2"""


def _table(dataset: str, text: str) -> dict[str, dict[str, float]]:
    words = text.split()
    scores = {name: pair.split("/") for name, pair in zip(words[::2], words[1::2], strict=True)}
    return {
        f"{dataset}/{name}": {"image_auroc": float(image), "pixel_auroc": float(pixel)}
        for name, (image, pixel) in scores.items()
    }


PUBLISHED = {
    **_table("mvtec_ad", _MVTEC),
    **_table("visa", _VISA),
    "kolektor_sdd2/surface": {"pixel_auroc": 98.7},
}


def defaults() -> ConfigDict:
    """The group `mala`."""
    own = ConfigDict()
    own.size = "large"  # of the encoder: tiny | small | base | large, or "" with the next three
    own.width = 0  # 0 = from size
    own.depth = 0
    own.heads = 0
    own.decoder_width = 512
    own.decoder_depth = 8
    own.decoder_heads = 16
    own.init = "mae"  # mae (with its decoder) | scratch | a file of MAE's, or of a timm ViT
    own.pixels = "imagenet"  # mean and deviation of the encoder's images: imagenet | half (timm's)
    # The ablation of table 4, and `freeze`.
    own.pipeline = "end2end"  # end2end | reconstruct (stage 1 alone; the map is what differs)
    own.stage1 = True
    own.plpm = "adversarial"  # adversarial | cooperative | none
    own.tbm = "linear"  # linear | gelu (GELU and a norm between both projections) | none
    own.freeze = True  # of the encoder, in stage 2
    # Two numbers each: of stage 1 and of stage 2.
    own.epochs = (2000, 700)
    own.batch_sizes = (128, 32)
    own.images = (200, 80)  # of each category in an epoch; 0 = all
    own.learning_rates = (0.0, 0.0)  # 0 = 1e-3 * batch size / 256 (paper)
    # Stage 1.
    own.mask_ratio = 0.75
    own.missing = "token"  # stands for hidden patches: token (MAE's, learned) | zero (paper)
    own.paint_weights = (1.0, 1.0, 0.01)  # of L1, 1 - SSIM, judgement; the paper gives none
    own.plpm_base = 64  # channels after its first convolution
    own.plpm_rate = 2e-4
    own.schedule = "cosine"  # cosine (MAE) | constant
    own.warmup = 40 / 2000  # share of the epochs
    own.weight_decay = 0.05  # of both stages, less PLPM
    # Stage 2.
    own.redraw = False  # whether each epoch takes other images of a category
    own.defective = 0.8  # share of the images that get a defect: 64 of 80
    own.on_part = 0.5  # share of the defects that are confined to the part, as found by otsu
    # Data sets or parts whose pictures the part fills, so that it is not sought.
    own.surfaces = (
        *("mvtec_ad/carpet", "mvtec_ad/grid", "mvtec_ad/leather", "mvtec_ad/tile", "mvtec_ad/wood"),
        *("magnetic_tile", "kolektor_sdd2"),
    )
    own.map_weights = (1.0, 1.0)  # of L1 and focal loss; the paper gives none
    own.attention = "auto"  # xla | cudnn | auto, as student.attention
    own.pool = 21  # px, side of the mean whose maximum is the score; the paper gives none
    return ConfigDict({"mala": own})


def check(config: ConfigDict) -> None:
    """Raises ValueError for values of the group that cannot work."""
    options = config.mala
    config_lib.check_choices(
        config,
        {
            "mala.attention": ("auto", "xla", "cudnn"),
            "mala.pixels": ("imagenet", "half"),
            "mala.pipeline": ("end2end", "reconstruct"),
            "mala.plpm": ("adversarial", "cooperative", "none"),
            "mala.tbm": ("linear", "gelu", "none"),
            "mala.missing": ("token", "zero"),
            "mala.schedule": ("cosine", "constant"),
        },
    )
    config_lib.check_ranges(
        config,
        ("mala.decoder_width", 4, 1 << 20),
        ("mala.decoder_depth", 1, 1 << 10),
        ("mala.decoder_heads", 1, 1 << 10),
        ("mala.epochs", 1, 1 << 40),
        ("mala.batch_sizes", 1, 1 << 40),
        ("mala.images", 0, 1 << 40),
        ("mala.learning_rates", 0.0, 10.0),
        ("mala.mask_ratio", 0.0, 0.99),
        ("mala.paint_weights", 0.0, 1e6),
        ("mala.plpm_base", 1, 1 << 16),
        ("mala.plpm_rate", 0.0, 10.0),
        ("mala.warmup", 0.0, 0.99),
        ("mala.weight_decay", 0.0, 1e3),
        ("mala.defective", 0.0, 1.0),
        ("mala.on_part", 0.0, 1.0),
        ("mala.map_weights", 0.0, 1e6),
        ("mala.pool", 1, 1 << 10),
    )
    for name, count in (
        *((f"mala.{field}", 2) for field in ("epochs", "batch_sizes", "images", "learning_rates")),
        *(("mala.paint_weights", 3), ("mala.map_weights", 2)),
    ):
        value = options[name.removeprefix("mala.")]
        if len(value) != count:
            raise ValueError(
                f"--config.{name}={value}: expected {count} numbers, one per stage"
                if count == 2
                else f"--config.{name}={value}: expected {count} numbers"
            )
    if not options.stage1:
        _check_without_stage1(options)
    config_lib.check_folder(config, "data.textures")


def _check_without_stage1(options: ConfigDict) -> None:
    if options.pipeline == "reconstruct":
        raise ValueError("mala.pipeline=reconstruct scores by stage 1: set mala.stage1=true")
    if options.init == "scratch" and options.freeze:
        raise ValueError(
            "mala.stage1=false with mala.init=scratch freezes an encoder that has learned nothing; "
            "set mala.freeze=false, or mala.init to a file"
        )


def check_file(options: ConfigDict, facts: dict) -> None:
    """Raises ValueError if stage 2 would begin with a decoder that a MAE file lacks."""
    if not options.stage1 and facts.get("mae") and not facts["decoder"]:
        raise ValueError(
            f"mala.init={options.init!r} is MAE's encoder without its decoder, and mala.stage1="
            "false trains no decoder before stage 2; give a mae_visualize_vit_*.pth, or set "
            "mala.stage1=true"
        )


def grid(config: ConfigDict, patch: int) -> tuple[int, int]:
    """Patches per column and per row of an image; ValueError if they do not divide it."""
    size = tuple(config.data.image_size)
    if any(side % patch for side in size):
        near = tuple(max(1, round(side / patch)) * patch for side in size)
        raise ValueError(
            f"data.image_size={size} must be a multiple of {patch} px; try {near[0]},{near[1]}"
        )
    return size[0] // patch, size[1] // patch


def stages(options: ConfigDict, names: tuple[str, str]) -> tuple[str, ...]:
    """Those of the two stages that run."""
    runs = options.stage1, options.pipeline == "end2end"
    return tuple(name for name, does in zip(names, runs, strict=True) if does)


def plans(options: ConfigDict, parts: np.ndarray) -> tuple[epochs.Plan, epochs.Plan]:
    """How both stages fill their batches.

    Args:
      options: the group `mala`.
      parts: "<dataset>/<category>" of each training image.
    """
    common = {"category": np.unique(parts, return_inverse=True)[1]}
    common["batch_field"] = "mala.batch_sizes"
    localise = epochs.Plan(
        options.batch_sizes[1],
        per_category=options.images[1],
        same=not options.redraw,
        defects=perlin.Recipe(on_part=options.on_part),
        defective=options.defective,
        foreground=options.on_part > 0,
        fills=np.array([is_surface(part, options.surfaces) for part in parts]),
        **common,
    )
    return epochs.Plan(options.batch_sizes[0], "drop", options.images[0], **common), localise


def few(options: ConfigDict, parts: np.ndarray) -> str:
    """Names the categories that an epoch shows more than once, as a line; "" if there are none.

    Args:
      options: the group `mala`.
      parts: "<dataset>/<category>" of each training image.
    """
    names, counts = np.unique(parts, return_counts=True)
    quota = max(options.images)
    found = [f"{name} ({n})" for name, n in zip(names, counts, strict=True) if n < quota]
    return (
        f"mala.images={tuple(options.images)}: an epoch shows images of categories with fewer "
        f"images several times: {', '.join(found)}"
        if found
        else ""
    )


def rate(options: ConfigDict, stage: int) -> float:
    """The largest learning rate of a stage, 0 or 1: as given, or by the paper's rule."""
    return options.learning_rates[stage] or BASE_RATE * options.batch_sizes[stage] / 256


def is_surface(part: str, surfaces: tuple[str, ...]) -> bool:
    """Whether "<dataset>/<category>" or its data set is among `surfaces`."""
    return part in surfaces or part.split("/")[0] in surfaces

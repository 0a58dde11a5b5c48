"""Magnetic tiles (Huang et al., The Visual Computer 2020), split by tile, ResNet-18 teacher.

python -m mmrjax.main --config=configs/magnetic_tile.py --workdir=runs/tile \
    --config.data.raw_dir=<Magnetic-tile-defect-datasets.>

A student of width 192, depth 6 and 3 heads, from scratch, 40 epochs. Full view: the whole tile
resized to 224. Expected image AUROC / pixel AUROC / aupro_0.3 / pro_mmr in percent, measured with
the official PyTorch code on the same split: MMR 82.1 / 71.1 / 75.0 / 74.7; PatchCore 87.2 / 74.8 /
74.3 / 73.2 (1 % coreset).

Variants: `magnetic_tile.py:crop` evaluates as the MMR code does (resize 256, centre crop 224, which
cuts 47 of 392 defects away entirely): MMR 74.2 / 70.8 / 68.2 / 70.6, PatchCore 81.5 / 75.1 / 72.8 /
71.5. `magnetic_tile.py:image_split` draws images at random: exposures of one tile then lie on both
sides, so its scores are too good; it exists to measure by how much.
"""

from configs import common


def get_config(variant: str = "full"):
    """Returns the configuration of the "full" or "crop" view, or of the leaking "image_split"."""
    if variant not in ("full", "crop", "image_split"):
        raise ValueError(f"magnetic_tile.py:{variant}: known are full, crop and image_split")
    config = common.get_config()
    config.title = f"Magnetic tiles ({variant})"
    config.data.name = "magnetic_tile"
    config.data.resize = (256, 256) if variant == "crop" else (224, 224)
    if variant == "image_split":
        config.data.protocol = "image_split"
    config.teacher.name = "resnet18"
    config.student.size = "tiny"
    config.student.depth = 6
    config.student.init = "scratch"
    config.aminet.width = 192
    config.aminet.heads = 3
    config.aminet.depth = 6
    config.aminet.epochs = 40
    config.mmr_plus.domain = "supcon"  # of the six exposures
    config.train.epochs = 40
    return config

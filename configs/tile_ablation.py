"""Two ablations of arXiv 2304.02216, section 6, on the magnetic tiles with the small student.

python -m mmrjax.main --config=configs/tile_ablation.py --workdir=runs/tile_ablation \
    --config.data.raw_dir=<Magnetic-tile-defect-datasets.>

is the mask ratio, as `tile_ablation.py:mask_ratio`; `tile_ablation.py:mask_form` drops tokens or
hides 16 px units of pixels, at ratio 0.4. In one work directory both share the run of the default;
the report on top of it is that of the last command. Everything else is configs/magnetic_tile's.

Expected, from the paper's figures 12 and 13 on another data set: best near 0.4, worse at both ends,
and hiding below dropping. The default is that of magnetic_tile: image AUROC 82.2.
"""

from configs import magnetic_tile

TABLES = {
    "mask_ratio": tuple(
        (f"mask ratio {ratio}", (f"student.mask_ratio={ratio}",), "")
        for ratio in (0.0, 0.2, 0.4, 0.6, 0.8)
    ),
    "mask_form": (
        ("hide 16 px", ("student.mask_form=pixel", "student.mask_unit=16"), ""),
        ("drop 16 px", ("student.mask_form=drop",), ""),
    ),
}


def get_config(name: str = "mask_ratio"):
    """Returns the sweep over the "mask_ratio" or the "mask_form"."""
    if name not in TABLES:
        raise ValueError(f"tile_ablation.py:{name}: known are {', '.join(TABLES)}")
    config = magnetic_tile.get_config()
    config.title = f"Magnetic tiles, ablation: {name.replace('_', ' ')}"
    config.sweep.rows = TABLES[name]
    config.sweep.metrics = ("image_auroc", "pixel_auroc", "aupro_0.3", "pro_mmr")
    config.sweep.average = "images"  # as configs/magnetic_tile.py reports; no shift between domains
    return config

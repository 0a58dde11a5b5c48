"""Which blocks of ViT-tiny PatchCore and SubspaceAD should read, judged on training tiles.

python -m mmrjax.main --config=docs/evidence/vit_settings.py:patchcore --workdir=runs/vit_a \
    --config.data.raw_dir=<Magnetic-tile-defect-datasets.> --config.teacher.weights=<file>
python -m mmrjax.main --config=docs/evidence/vit_settings.py:subspace_ad --workdir=runs/vit_b …

Held-out good training tiles and copies of them with drawn defects judge each row; no row saw the
test. Measured with timm's vit_tiny_patch16_224 at 224 px, seed 0: image AUROC / pixel AUROC /
aupro_0.3, percent.

  PatchCore, blocks 2 and 4                  72.1 / 71.7 / 48.9
  PatchCore, blocks 3 and 6                  71.2 / 71.3 / 49.2
  PatchCore, blocks 4 and 8                  71.6 / 72.1 / 51.5
  PatchCore, blocks 6 and 9                  70.5 / 72.4 / 50.5
  PatchCore, blocks 8 and 12                 71.1 / 75.2 / 53.0
  PatchCore, block 6                         72.4 / 70.9 / 53.0
  PatchCore, blocks 6 and 9, single patches  73.2 / 73.2 / 50.7
  SubspaceAD, 99 % of the variance           71.7 / 76.3 / 61.5
  SubspaceAD, 90 % of the variance           73.8 / 78.0 / 63.6

Blocks 8 and 12 have PatchCore's highest mean of the three. They are layers 2 and 3 of every ViT
since (a tap after each third of the blocks); other ViTs were not judged.
"""

from configs import magnetic_tile

ROWS = {
    "patchcore": (
        ("blocks 2, 4", ("teacher.taps=2,4",), ""),
        ("blocks 3, 6", ("teacher.taps=3,6",), ""),
        ("blocks 4, 8", ("teacher.taps=4,8",), ""),
        ("blocks 6, 9", ("teacher.taps=6,9",), ""),
        ("blocks 8, 12", ("teacher.taps=8,12",), ""),
        ("block 6", ("teacher.taps=6,12", "patchcore.layers=1"), ""),
        ("blocks 6, 9, single patches", ("teacher.taps=6,9", "patchcore.patch=1"), ""),
    ),
    "subspace_ad": (
        ("99 %", (), ""),
        ("90 %", ("subspace_ad.variance=0.9",), ""),
    ),
}


def get_config(method):
    """Returns the table of "patchcore" or of "subspace_ad"."""
    config = magnetic_tile.get_config()
    config.title = f"Blocks of ViT-tiny ({method})"
    config.method.names = (method,)
    config.teacher.name = "vit_tiny_patch16_224"
    config.patchcore.layers = (1, 2)
    config.sweep.judge = "held_out_defects"
    config.sweep.metrics = ("image_auroc", "pixel_auroc", "aupro_0.3")
    config.sweep.rows = ROWS[method]
    return config

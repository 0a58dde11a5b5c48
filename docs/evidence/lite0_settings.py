"""Which stages and widths of EfficientNet-lite0 PatchCore should read, judged on training pictures.

python -m mmrjax.main --config=docs/evidence/lite0_settings.py:tiles --workdir=runs/lite0_tiles \
    --config.data.raw_dir=<Magnetic-tile-defect-datasets.>
python -m mmrjax.main --config=docs/evidence/lite0_settings.py:demo --workdir=runs/lite0_demo

Held-out good training pictures and copies of them with drawn defects judge each row.
"""

from configs import demo, magnetic_tile


def get_config(variant):
    """Returns the table on the magnetic tiles ("tiles") or on the embedded demo ("demo")."""
    config = demo.get_config() if variant == "demo" else magnetic_tile.get_config()
    config.title = f"EfficientNet-lite0 for PatchCore ({variant})"
    config.method.names = ("patchcore",)
    config.teacher.name, config.teacher.weights = "efficientnet_lite0", "embedded"
    config.patchcore.update(
        layers=(2, 3),
        scales=(1.0,),
        width=0,
        candidates=200_000,
        coreset=0.01,
        whiten=0.0,
        relative=False,
    )
    config.sweep.judge = "held_out_defects"
    config.sweep.metrics = ("image_auroc", "pixel_auroc", "aupro_0.3")
    config.sweep.rows = (
        ("stages 3, 5", (), ""),
        ("stages 3, 5, width 1024", ("patchcore.width=1024",), ""),
        ("stages 2, 3, 5", ("patchcore.layers=1,2,3",), ""),
        ("stages 3, 4", ("teacher.taps=2,3,4",), ""),
        ("stages 3, 4, 5", ("teacher.taps=3,4,5", "patchcore.layers=1,2,3"), ""),
        ("stages 2, 4", ("teacher.taps=1,2,4",), ""),
        ("stages 3, 6", ("teacher.taps=2,3,6",), ""),
        ("stages 5, 6", ("teacher.taps=3,5,6",), ""),
        ("stages 3, 5, no neighbourhood", ("patchcore.patch=1",), ""),
        ("stages 3, 5, enlarged 1.5 times", ("patchcore.scales=1.5",), ""),
    )
    return config

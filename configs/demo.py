"""The embedded demo: procedural blades, no download, minutes on two cores.

python -m mmrjax.main --config=configs/demo.py --workdir=runs/demo

Trains a small MMR student and fits PatchCore on the same parts, and reports what each shift costs.
The teacher, EfficientNet-lite0, comes with the program. Expected image AUROC: PatchCore 90.8 in the
unshifted domain, and 60.2 / 86.1 / 63.4 with shifted background, light and view; MMR 91.1, and 53.1
/ 64.9 / 69.9 (docs/results.md).
"""

from configs import common


def get_config():
    """Returns the configuration."""
    config = common.get_config()
    config.title = "Demo: procedural blades"
    config.method.names = ("mmr", "patchcore")
    config.data.name = "demo_parts"
    config.data.image_size = (256, 256)  # as drawn: a fifth of the defects are under 10 px
    config.data.resize = (256, 256)
    config.data.reference_domain = "same"
    config.calibration.fraction = 0.1
    config.teacher.name = "efficientnet_lite0"
    config.teacher.weights = "embedded"
    config.student.size = "tiny"
    config.student.depth = 4
    config.student.init = "scratch"
    config.aminet.width = 192
    config.aminet.heads = 3
    config.aminet.depth = 4
    config.aminet.epochs = 20
    common.small_mala(config, epochs=(60, 60))
    config.patchcore.layers = (1, 2, 3)  # layer 1: a grid of 64 x 64, for small defects
    config.patchcore.width = 0
    config.patchcore.candidates = 100_000
    config.patchcore.coreset = 0.002
    config.mmr_plus.foreground = "otsu"  # on the blade
    config.train.epochs = 20
    return config

"""The embedded demo: procedural blades, no download, minutes on two cores.

python -m mmrjax.main --config=configs/demo.py --workdir=runs/demo

Trains a small MMR student and fits PatchCore on the same parts, and reports what each shift costs.
The teacher is random until embedded weights exist, and the program says so. Expected image AUROC in
the unshifted domain, measured on two cores: MMR 69.3, PatchCore 66.7; under the shifts both stay
near 50. With --config.teacher.weights=imagenet PatchCore reaches 92.3.
"""

from configs import common


def get_config():
    """Returns the configuration."""
    config = common.get_config()
    config.title = "Demo: procedural blades"
    config.method.names = ("mmr", "patchcore")
    config.data.name = "demo_parts"
    config.data.resize = (224, 224)
    config.data.reference_domain = "same"
    config.calibration.fraction = 0.1
    config.teacher.name = "resnet18"
    config.teacher.weights = "random"
    config.student.size = "tiny"
    config.student.depth = 4
    config.student.init = "scratch"
    config.aminet.width = 192
    config.aminet.heads = 3
    config.aminet.depth = 4
    config.aminet.epochs = 20
    config.train.epochs = 20
    return config

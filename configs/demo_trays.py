"""Large pictures, tiny defects: trays of sixteen procedural blades at 1024 px, no download.

python -m mmrjax.main --config=configs/demo_trays.py --workdir=runs/trays

PatchCore with the embedded teacher looks at all of a picture through windows of 256 px (tiling).
Expected scores, beside those of the same pictures shrunk to 256 or 512 px: docs/use.md.
"""

from configs import demo


def get_config():
    """Returns the configuration."""
    config = demo.get_config()
    config.title = "Demo: trays of blades, tiny defects"
    config.method.names = ("patchcore",)
    config.data.name = "demo_trays"
    config.data.reference_domain = ""
    config.data.resize = (1024, 1024)  # as drawn
    config.data.tiling = True
    config.patchcore.candidates = 0
    config.calibration.fraction = 0.0  # four trays
    config.train.seeds = (0,)
    config.eval.batch_size = 4
    return config

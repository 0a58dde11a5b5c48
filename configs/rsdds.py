"""RSDDs, rail surfaces (Gan et al., IEEE Sensors Journal 2017), as tiles; types `i` and `ii`.

python -m mmrjax.main --config=configs/rsdds.py --workdir=runs/rsdds --config.data.raw_dir=<RSDDs>
python -m mmrjax.main --config=configs/rsdds.py:ii --workdir=runs/rsdds_ii --config.data.raw_dir=…

Expected: we know of no published one-class result, and the data set was not at hand to run
here. Tiles of 160 and of 55 pixels are enlarged to 224; the split is by strip.
"""

from configs import common


def get_config(part: str = ""):
    """Returns the configuration of type `i` (express), `ii` (heavy haul), or of both in turn."""
    if part not in ("", "i", "ii"):
        raise ValueError(f"rsdds.py:{part}: known are i (express) and ii (heavy haul)")
    config = common.get_config()
    config.title = f"RSDDs {part.upper()}".strip()
    config.data.name = "rsdds"
    config.data.categories = (part,) if part else ()
    config.data.resize = (224, 224)  # the whole tile: a crop could cut a defect away
    return config

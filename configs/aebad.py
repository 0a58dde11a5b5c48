"""AeBAD, aero-engine blades under domain shift (arXiv 2304.02216).

python -m mmrjax.main --config=configs/aebad.py --workdir=runs/aebad --config.data.raw_dir=<AeBAD>
python -m mmrjax.main --config=configs/aebad.py:v --workdir=runs/aebad_v --config.data.raw_dir=…

Expected (tables 2-4, MMR, five seeds): AeBAD-S image AUROC same 85.6, background 84.4, illumination
88.8, view 79.9, mean 84.7; pro_mmr 89.1. AeBAD-V image AUROC 75.7 / 88.3 / 70.7, mean 78.2. Not run
here: the data set was not at hand.
"""

from configs import common


def get_config(part: str = "s"):
    """Returns the configuration of AeBAD-S ("s", images) or AeBAD-V ("v", videos)."""
    if part not in ("s", "v"):
        raise ValueError(f"aebad.py:{part}: known are s (images) and v (videos)")
    config = common.get_config()
    config.title = f"AeBAD-{part.upper()}"
    config.data.name = "aebad"
    config.data.categories = (part,)
    config.data.reference_domain = "same" if part == "s" else ""
    config.mmr_plus.foreground = "otsu"  # on the blade
    return config

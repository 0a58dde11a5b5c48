"""MVTec AD (Bergmann et al., IJCV 2021): fifteen categories, one model each.

python -m mmrjax.main --config=configs/mvtec.py --workdir=runs/mvtec --config.data.raw_dir=…
python -m mmrjax.main --config=configs/mvtec.py:screw --workdir=runs/screw --config.data.raw_dir=…

Expected (arXiv 2304.02216, tables 5 and 6, MMR, mean of 15): image AUROC 98.4, pixel AUROC 97.2,
pro_mmr 92.6; screw 92.5 / 99.5 / 97.6. Not run here: the data set was not at hand.
"""

from configs import common


def get_config(category: str = ""):
    """Returns the configuration of one category, or of all fifteen in turn."""
    config = common.get_config()
    config.title = f"MVTec AD {category}".strip()
    config.data.name = "mvtec_ad"
    config.data.categories = (category,) if category else ()
    return config

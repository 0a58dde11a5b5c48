"""BTAD (Mishra et al., ISIE 2021): products 01, 02 and 03, one model each.

python -m data_builders.build btad --download --raw_dir=btad --data_dir=~/.cache/mmrjax/records
python -m mmrjax.main --config=configs/btad.py --workdir=runs/btad --config.data.raw_dir=btad
python -m mmrjax.main --config=configs/btad.py:02 --workdir=runs/btad02 --config.data.raw_dir=btad

Expected: the MMR paper has no number for this data set; PatchCore as the AMI-Net paper (IEEE
TASE 2024) gives it, mean of three: image AUROC 90.0, pixel AUROC 96.5. Not run here: the data set
was not at hand.
"""

from configs import common


def get_config(category: str = ""):
    """Returns the configuration of one product, or of all three in turn."""
    config = common.get_config()
    config.title = f"BTAD {category}".strip()
    config.data.name = "btad"
    config.data.categories = (category,) if category else ()
    return config

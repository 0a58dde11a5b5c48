"""VisA (Zou et al., ECCV 2022): twelve objects, one model each.

python -m data_builders.build visa --download --raw_dir=visa --data_dir=~/.cache/mmrjax/records
python -m mmrjax.main --config=configs/visa.py --workdir=runs/visa --config.data.raw_dir=visa
python -m mmrjax.main --config=configs/visa.py:pcb1 --workdir=runs/pcb1 --config.data.raw_dir=visa

Expected: the MMR paper has no number for this data set, and it was not at hand to run here.
"""

from configs import common


def get_config(category: str = ""):
    """Returns the configuration of one object, or of all twelve in turn."""
    config = common.get_config()
    config.title = f"VisA {category}".strip()
    config.data.name = "visa"
    config.data.categories = (category,) if category else ()
    return config

"""MVTec AD and VisA together: one model for all 27 categories, as MALA's paper trains it.

python -m mmrjax.main --config=configs/mvtec_visa.py --workdir=runs/mvtec_visa \
    --config.raw_dirs.mvtec_ad=<MVTec AD> --config.raw_dirs.visa=<VisA>

Expected (IEEE Access 2023, tables 1 and 3), image AUROC / pixel AUROC: MVTec AD 98.6 / 97.1, VisA
93.0 / 97.2; the report gives the mean of each. The weights are MAE's ViT-L with its decoder. Not
run here: neither the data sets nor the weights were at hand.
"""

from configs import common


def get_config(method: str = "mala"):
    """Returns the configuration of a method; "mala" is the only one so far."""
    if method != "mala":
        raise ValueError(f"mvtec_visa.py:{method}: known is mala")
    config = common.get_config()
    config.title = "MVTec AD and VisA, one model"
    config.method.names = ("mala",)
    config.data.name = "mvtec_visa"
    config.data.join = ("mvtec_ad", "visa")
    config.data.resize = (224, 224)  # the whole picture, as the paper resizes it
    config.train.seeds = (0,)
    return config

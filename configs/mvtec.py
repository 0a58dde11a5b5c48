"""MVTec AD (Bergmann et al., IJCV 2021): fifteen categories, one model each.

python -m mmrjax.main --config=configs/mvtec.py --workdir=runs/mvtec --config.data.raw_dir=…
python -m mmrjax.main --config=configs/mvtec.py:screw --workdir=runs/screw --config.data.raw_dir=…

Expected (arXiv 2304.02216, tables 5 and 6, MMR, mean of 15): image AUROC 98.4, pixel AUROC 97.2,
pro_mmr 92.6; screw 92.5 / 99.5 / 97.6. Not run here: the data set was not at hand.

AMI-Net as its official code trains it, but with the last epoch evaluated:

python -m mmrjax.main --config=configs/mvtec.py --workdir=runs/aminet --config.data.raw_dir=… \
    --config.method.names=aminet --config.data.image_size=256,256 \
    --config.data.resize=256,256 --config.data.interpolation=lanczos

Expected (IEEE TASE 2024, with jitter, mean of 15, best epoch on the test set): image AUROC 99.0,
pixel AUROC 98.2. The paper's own numbers instead of its code's: --config.aminet.epochs=200
--config.aminet.learning_rate=1e-3 --config.aminet.pool=1 --config.aminet.train_mask_token=false
--config.aminet.squared=true. Not run here either.
"""

from configs import common


def get_config(category: str = ""):
    """Returns the configuration of one category, or of all fifteen in turn."""
    config = common.get_config()
    config.title = f"MVTec AD {category}".strip()
    config.data.name = "mvtec_ad"
    config.data.categories = (category,) if category else ()
    return config

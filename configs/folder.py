"""Your own parts: any directory of good images, with optional defective images and masks.

python -m mmrjax.main --config=configs/folder.py --workdir=runs/mine --config.data.raw_dir=<folder>

Understood layouts: MVTec's (train/good, test/<type>, ground_truth/<type>); good/ beside folders of
defects, masks in ground_truth/ or masks/ or beside the images; or one flat folder of good images.
Without a split, every fifth good image is kept for testing. Expected score: yours to find out; the
report says how sure it is.
"""

from configs import common


def get_config():
    """Returns the configuration."""
    config = common.get_config()
    config.title = "Own parts"
    config.method.names = ("mmr", "patchcore")
    config.data.name = "folder"
    config.data.resize = (224, 224)  # the whole frame: a crop could cut a defect away
    config.data.max_side = 1024
    return config

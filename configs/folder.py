"""Your own parts: any directory of good images, with optional defective images and masks.

python -m mmrjax.main --config=configs/folder.py --workdir=runs/mine --config.data.raw_dir=<folder>

Understood layouts: MVTec's (train/good, test/<type>, ground_truth/<type>); good/ beside folders of
defects, masks in ground_truth/ or masks/ or beside the images; or one flat folder of good images.
Without a split, every fifth good image is kept for testing. Every other one trains PatchCore, whose
threshold comes from scoring each without its own part; two parts give a first threshold, 19 the one
at 5 % (calibration.way). For other methods a tenth of the training images is held out, if that is
four or more (calibration.fraction). Expected score: yours to find out; the report says how sure it
is.

Sized for a CPU: EfficientNet-lite0 as teacher, which comes with the program, and a small student
from scratch. With a GPU, the paper's models are --config.teacher.name=wide_resnet50_2
--config.teacher.weights=imagenet --config.student.size=base --config.student.depth=0
--config.student.init=mae --config.train.epochs=200 (MAE weights are CC BY-NC: not for business).
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
    config.calibration.way = "auto"
    config.calibration.fraction = 0.1
    config.patchcore.coreset_of = "image"  # then the promise of leaving images out is proven
    config.teacher.name = "efficientnet_lite0"  # Apache-2.0, no download
    config.teacher.weights = "embedded"
    config.patchcore.width = 0
    config.student.size = "tiny"
    config.student.depth = 6
    config.student.init = "scratch"
    config.aminet.width = 192
    config.aminet.heads = 3
    config.aminet.depth = 6
    config.aminet.epochs = 100
    common.small_mala(config, epochs=(100, 100))
    config.train.epochs = 100
    return config

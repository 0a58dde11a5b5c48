"""KolektorSDD2 (Božič et al., Computers in Industry 2021), one-class: good images train.

python -m mmrjax.main --config=configs/kolektor_sdd2.py --workdir=runs/kolektor_sdd2 \
    --config.data.raw_dir=<KolektorSDD2>

Expected: the MMR paper has no number for this data set, and it was not at hand to run here.
The images are some 230 wide and 630 high. By default they are resized to 224 x 224, as elsewhere;
--config.data.image_size=640,224 --config.data.resize=640,224 keeps their shape, at three times the
work.
"""

from configs import common


def get_config():
    """Returns the configuration."""
    config = common.get_config()
    config.title = "KolektorSDD2"
    config.data.name = "kolektor_sdd2"
    config.data.resize = (224, 224)  # the whole surface: a crop could cut a defect away
    return config

"""KolektorSDD2 and the magnetic tiles together: one model, 100 good tiles, as MALA's paper has it.

python -m mmrjax.main --config=configs/kolektor_tiles.py --workdir=runs/kolektor_tiles \
    --config.raw_dirs.kolektor_sdd2=<KolektorSDD2> --config.raw_dirs.magnetic_tile=<tiles>

The 100 good tiles are drawn from the training side of our split by tile, and the test is that of
configs/magnetic_tile.py. The paper does not say which tiles it tests. An epoch of stage 1 shows 200
images of each data set, so each of the 100 tiles twice; an epoch of stage 2 shows 80.

Expected (IEEE Access 2023, table 5): pixel AUROC 98.7 on KolektorSDD2; of the tiles the text gives
differences alone. Not run here: KolektorSDD2 and the weights were not at hand.
"""

from configs import common


def get_config(method: str = "mala"):
    """Returns the configuration of a method; "mala" is the only one so far."""
    if method != "mala":
        raise ValueError(f"kolektor_tiles.py:{method}: known is mala")
    config = common.get_config()
    config.title = "KolektorSDD2 and magnetic tiles, one model"
    config.method.names = ("mala",)
    config.data.name = "kolektor_tiles"
    config.data.join = ("kolektor_sdd2", "magnetic_tile")
    config.data.protocol = "k_shot"
    config.data.shots = 100
    config.data.target = "magnetic_tile/tile"
    config.data.resize = (224, 224)
    config.train.seeds = (0,)
    return config

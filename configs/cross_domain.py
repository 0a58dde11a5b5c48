"""One model on several data sets at once: the cross-domain protocol of MMR+ (docs/mmr_plus.md).

python -m mmrjax.main --config=configs/cross_domain.py --workdir=runs/cross \
    --config.raw_dirs.aebad=<AeBAD> --config.raw_dirs.magnetic_tile=<tiles> \
    --config.raw_dirs.rsdds=<RSDDs>
python -m mmrjax.main --config=configs/cross_domain.py:labelled --workdir=runs/cross_labelled \
    --config.raw_dirs.magnetic_tile=<tiles>
python -m mmrjax.main --config=configs/cross_domain.py:a --workdir=runs/cross_a \
    --config.raw_dirs.aebad=<AeBAD> --config.raw_dirs.magnetic_tile=<tiles>
python -m mmrjax.main --config=configs/cross_domain.py --workdir=runs/cross --mode=evaluate \
    --config.eval.stress=dark --config.raw_dirs.magnetic_tile=<tiles>

Track B, `:b`, the default: every data set is split 70 to 30 by group, drawn by the run's seed, and
some combinations of defect and condition are kept out of training. `:labelled` also cuts the
labelled defects of the 70 % out and blends them into good images of their data set, or learns from
them as mmr_plus.labelled_target says. Track A, `:a`,
keeps the published test of AeBAD-S; the others add good training images.

Data sets without a folder are left out; the demo's parts need none. Your own images join by
--config.raw_dirs.folder=<folder>. The dark test images are another view of a finished run, the
fourth command, with the same data sets as in its training.

Expected: nobody has published scores of this protocol, and AeBAD and RSDDs were not at hand.
"""

from configs import common

HELD_OUT = (
    "aebad/s:groove:illumination",
    "aebad/s:fracture:view",
    "demo_parts/blade:groove:illumination",
    "demo_parts/blade:fracture:view",
    "magnetic_tile/tile:crack:exp1",
    "magnetic_tile/tile:crack:exp2",
    "magnetic_tile/tile:blowhole:exp6",
    "rsdds/i:*:dark",
    "rsdds/ii:*:dark",
)


def get_config(track: str = "b"):
    """Returns the configuration of track "a" or "b", or of "b" with "labelled" defects."""
    if track not in ("a", "b", "labelled"):
        raise ValueError(f"cross_domain.py:{track}: known are a, b and labelled")
    config = common.get_config()
    config.title = {"a": "Cross-domain, track A", "b": "Cross-domain, track B"}.get(
        track, "Cross-domain, track B with labelled defects"
    )
    config.method.names = ("mmr", "mmr_plus", "patchcore")
    config.data.name = "cross_domain"
    config.data.join = ("aebad/s", "magnetic_tile", "rsdds", "demo_parts", "folder")
    if track == "a":
        config.data.protocol = "track_a"
        config.data.target = "aebad/s"
    else:
        config.data.protocol = "track_b"
        config.data.held_out = HELD_OUT
        config.data.labelled = track == "labelled"
        config.train.seeds = (0, 1, 2, 3, 4)  # of the split too
    config.data.resize = (224, 224)  # the whole picture: a crop could cut a defect away
    config.mmr_plus.foreground = "otsu"  # blades have a background
    config.mmr_plus.surfaces = ("magnetic_tile", "rsdds")
    config.mmr_plus.domain = "supcon"  # of the data sets
    return config

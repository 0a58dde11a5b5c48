"""The fields of a configuration group that ask for synthetic defects, and the recipe they make.

A method whose training shows defects adds `defaults` to its group, calls `check` in its own check,
and gives `recipe` to its plan; see data/defects/rows.py for what the step then hands to its loss.
"""

import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import tracks
from mmrjax.data.defects import places, rows, synthesise
from mmrjax.data.records import Records
from mmrjax.runtime import config as config_lib


def defaults() -> dict:
    """The fields, with their defaults."""
    return {
        "synthetic_every": 4,  # every 4th row of a batch gets a defect: 1 to 3 real; 0: none
        "defect_kinds": synthesise.TRAINING,
        # Where defects lie: all (textures, surfaces that fill the picture) | otsu (on the part,
        # found by its colour distance to the picture's border)
        "foreground": "all",
        "surfaces": (),  # joined data sets to which otsu does not apply: they fill the picture
        "defect_tiny": 0.6,  # share of defects under 10 px
        "defect_folder": "",  # of (picture, mask) pairs, as labelled defects
        "defect_labelled": 0.5,  # share of these and of data.labelled's, if there are some
        # Of labelled defects: blend (cut out, into a good picture, the target) | inpaint (the
        # picture as it is; target: the defect filled in) | ignore (its cells do not count)
        "labelled_target": "blend",
        "noise_intensity": 0.02,  # grain of spots, grooves, chips, fractures, as a share of 255
        "spatial_distribution": "uniform",  # uniform | edge | texture (where the picture is busy)
    }


def check(config: ConfigDict, group: str) -> None:
    """Raises ValueError for values of these fields that cannot work."""
    choices = {
        f"{group}.spatial_distribution": places.DISTRIBUTIONS,
        f"{group}.foreground": ("all", "otsu"),
        f"{group}.labelled_target": ("blend", "inpaint", "ignore"),
    }
    config_lib.check_choices(config, choices)
    config_lib.check_ranges(
        config,
        (f"{group}.synthetic_every", 0, 1 << 10),
        (f"{group}.defect_tiny", 0.0, 1.0),
        (f"{group}.defect_labelled", 0.0, 1.0),
        (f"{group}.noise_intensity", 0.0, 1.0),
    )
    config_lib.check_different(config, f"{group}.defect_kinds")
    config_lib.check_folder(config, f"{group}.defect_folder")
    options = config[group]
    is_known = config.data.labelled or options.defect_folder
    if options.labelled_target != "blend" and not is_known:
        raise ValueError(
            f"{group}.labelled_target={options.labelled_target}: there are no labelled defects; "
            f"set {group}.defect_folder, or data.labelled=true (protocol track_b)"
        )


def recipe(config: ConfigDict, group: str) -> rows.Recipe | None:
    """The recipe that the fields of a group describe; None if they ask for no defects."""
    options = config[group]
    if not options.synthetic_every:
        return None
    settings = synthesise.DefectSettings(
        kinds=tuple(options.defect_kinds),
        tiny_share=options.defect_tiny,
        noise_intensity=options.noise_intensity,
        spatial_distribution=options.spatial_distribution,
    )
    return rows.Recipe(
        options.synthetic_every,
        settings,
        labelled_target=options.labelled_target,
        labelled_share=options.defect_labelled,
        config=config,
    )


def foreground(options: ConfigDict, records: Records) -> tuple[bool, np.ndarray | None]:
    """`foreground` and `fills` of the plan of training images, see `epochs.Plan`."""
    on_part = bool(options.synthetic_every) and options.foreground == "otsu"
    if not (on_part and options.surfaces):
        return on_part, None
    sets = [str(part).split("/")[0] for part in tracks.part_of(records)]
    return on_part, np.isin(sets, options.surfaces)


def kinds(config: ConfigDict, group: str) -> set[str]:
    """The kinds of defects that may come."""
    options = config[group]
    real = {"real"} if config.data.labelled or options.defect_folder else set()
    return {*options.defect_kinds} | real

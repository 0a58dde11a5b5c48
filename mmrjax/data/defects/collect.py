"""The labelled defects that a training learns from, as arrays of fixed shape.

They come from the defective records of the training side and from a folder of (picture, mask)
pairs. A training may cut the defects out and blend them into good pictures, or show the pictures as
they are (labelled_target of the configuration group).
"""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import geometry, tracks
from mmrjax.data.defects import bank, labelled
from mmrjax.data.records import Records


def collect(
    config: ConfigDict,
    group: str,
    records: Records,
    defective: Records,
    turns: np.ndarray | None,
    by_domain: bool,
) -> tuple[dict, dict]:
    """Labelled defects, and how likely each is on a picture of each domain.

    Args:
      config: the whole configuration.
      group: the group with the fields of methods/defect_recipe.py.
      records: the good training images.
      defective: the defective records of the training side; often none.
      turns: the group that each good image takes turns with, str [n]; None: no turns.
      by_domain: whether a picture shown as it is takes the turn of its own domain.

    Returns:
      ({"labelled": arrays}, facts for results.json); both empty without any labelled defect.

    Raises:
      ValueError: there are labelled defects, but none that can be used.
    """
    folder, target = config[group].defect_folder, config[group].labelled_target
    if not (len(defective) or folder):
        return {}, {}
    whole = target != "blend"
    known = _known(defective, folder, geometry.View.of(config), whole, group)
    parts = tracks.part_of(records)
    first = [0] if turns is None else np.unique(turns, return_index=True)[1]
    if whole:
        # Each picture is of a domain of its own already, and takes its turn.
        domains = turns[first] if by_domain and len(np.unique(parts)) == 1 else None
        return _shown(known, target, parts[first], domains, group)
    arrays = {**known.bank._asdict(), "chances": known.chances(parts[first])}
    facts = {"labelled_defects": known.counts(), "labelled_too_large": known.left_out}
    return {"labelled": arrays}, facts


def _known(
    defective: Records, folder: str, view: geometry.View, whole: bool, group: str
) -> bank.Labelled:
    """The defects of records and folder together."""
    sources: list[bank.Labelled | None] = []
    if len(defective):
        sources.append(bank.from_records(defective, view, whole))
    if sources == [None]:
        fits = "" if whole else " that is small enough to be cut out"
        raise ValueError(
            f"data.labelled: none of the {len(defective)} defective training images has a "
            f"defect with pixel truth{fits}; set data.labelled=false"
        )
    if folder:
        try:
            sources.append(bank.from_folder(folder, view, whole))
        except ValueError as e:
            raise ValueError(f"--config.{group}.defect_folder: {e}") from e
    return bank.joined(sources)


def _shown(
    known: bank.Labelled,
    target: str,
    parts: Sequence[str],
    domains: Sequence[str] | None,
    group: str,
) -> tuple[dict, dict]:
    """The result of `collect` for pictures that are shown as they are."""
    usable, pictures = labelled.targets(target, *known.bank)
    if not usable.any():
        raise ValueError(
            f"{group}.labelled_target={target}: the defects of all {len(usable)} labelled "
            f"pictures fill them; set {group}.labelled_target=blend"
        )
    known = known.select(usable)
    facts = {"labelled_pictures": known.counts(), "labelled_left_out": known.left_out}
    arrays = {**known.bank._asdict(), **pictures, "chances": known.chances(parts, domains)}
    return {"labelled": arrays}, facts

"""Which mask belongs to which picture of a user's directory.

A mask lies in a folder of masks under the same sub-folder and name, or beside its picture; its name
may have a word more, as 000_mask, gt-000 or 000_label. Names are compared without case and form of
Unicode. A folder named after a picture may hold several masks of that picture (MVTec LOCO). A
two-level picture beside another picture of the same name is its mask (Real-IAD).
"""

import collections
import dataclasses
import pathlib

import numpy as np

from data_builders import images
from data_builders.folder import words

Places = dict[pathlib.Path, tuple[str, ...]]  # image -> the folders it lies in, below the root
LEVELS = 2  # of a picture that is a mask by its looks


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The masks of pictures.

    Attributes:
      masks: every mask.
      owned: picture -> its masks.
    """

    masks: tuple[pathlib.Path, ...]
    owned: dict[pathlib.Path, tuple[pathlib.Path, ...]]

    @classmethod
    def of(cls, pictures: Places, masks: Places) -> "Pairs":
        """Pairs pictures with masks.

        Args:
          pictures: picture -> its folders, without those that say nothing.
          masks: the same of masks, without the folder of masks.

        Raises:
          ValueError: a picture has two masks, or a mask two pictures.
        """
        by_stem = collections.defaultdict(list)
        for mask, place in masks.items():
            stems = {words.same(mask.stem), words.base_stem(mask.stem)}
            stems |= {(words.same(place[-1]),)} if place else set()  # all in a folder of its name
            for stem in stems:
                by_stem[stem].append((tuple(map(words.same, place)), mask))
        owned: dict[pathlib.Path, tuple[pathlib.Path, ...]] = {}
        owners: dict[pathlib.Path, pathlib.Path] = {}
        for picture, folders in pictures.items():
            place = tuple(map(words.same, folders))
            found = _find(picture, place, by_stem)
            for mask in found:
                if mask in owners:
                    raise ValueError(
                        f"{mask}: is it the mask of {owners[mask]} or of {picture}? Put masks into "
                        "sub-folders named as those of the images"
                    )
                owners[mask] = picture
            if found:
                owned[picture] = found
        return cls(tuple(masks), owned)

    def of_picture(self, picture: pathlib.Path) -> tuple[pathlib.Path, ...]:
        """The masks of a picture; () if it has none."""
        return self.owned.get(picture, ())

    def orphans(self) -> list[pathlib.Path]:
        """The masks that belong to no picture."""
        taken = {mask for masks in self.owned.values() for mask in masks}
        return [mask for mask in self.masks if mask not in taken]


def said(folders: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that say what a picture shows: without a split's, and without mere "images"."""
    silent = {words.TRAIN, words.TEST, words.NEUTRAL}
    return tuple(f for f in folders if not (words.meaning(f)[0] and words.meaning(f)[0] <= silent))


def is_usual(picture: pathlib.Path, mask: pathlib.Path) -> bool:
    """Whether a mask is named as in published data sets: as its picture, with _mask or _GT."""
    folder = {picture.stem, picture.parent.name}
    stem = mask.stem.removesuffix("_mask").removesuffix("_GT").removesuffix("_label")
    return (mask.parent.name in folder and stem == picture.stem) or mask.parent.name == picture.stem


def move_masks_beside(pictures: Places, masks: Places) -> None:
    """Moves the masks that lie beside their pictures from `pictures` to `masks`."""
    stems = collections.defaultdict(list)
    for path in pictures:
        stems[path.parent, words.same(path.stem)].append(path)
    for path in list(pictures):
        base = words.base_stem(path.stem)
        if base != words.same(path.stem) and (path.parent, base) in stems:
            masks[path] = pictures.pop(path)
    for twins in stems.values():
        twins = [path for path in twins if path in pictures]
        if len(twins) > 1:
            flat = [path for path in twins if _is_two_level(path)]
            for path in flat if len(flat) == len(twins) - 1 else ():
                masks[path] = pictures.pop(path)


def _is_two_level(path: pathlib.Path) -> bool:
    """Whether a picture looks like a mask: two levels, or nearly so in a lossy file."""
    try:
        grey = images.read_grey(path)
    except (ValueError, OSError):
        return False
    levels, counts = np.unique(grey, return_counts=True)
    if levels.size <= LEVELS:
        return True
    near = (levels <= levels[0] + 16) | (levels >= levels[-1] - 16)
    return bool(levels[-1] - levels[0] > 64 and counts[near].sum() > 0.98 * grey.size)


def _find(picture: pathlib.Path, place: tuple, by_stem: dict) -> tuple[pathlib.Path, ...]:
    """The masks whose folders fit best: beside the picture, of its place, or in no folder."""
    stem = words.same(picture.stem)
    candidates = by_stem[stem]
    beside = [mask for _, mask in candidates if mask.parent == picture.parent]
    same = [mask for other, mask in candidates if place and other == place]
    near = [mask for other, mask in candidates if place and other and _ends(other, place)]
    loose = [mask for other, mask in candidates if not other]
    for fitting in (beside, same, near, loose):
        if len(fitting) > 1:
            raise ValueError(f"{picture}: which is its mask, {fitting[0]} or {fitting[1]}?")
        if fitting:
            return (fitting[0],)
    parts = [mask for other, mask in by_stem[stem,] if _ends(other[:-1], place) or not other[:-1]]
    return tuple(sorted(parts))


def _ends(one: tuple, other: tuple) -> bool:
    """Whether the shorter of two places is the end of the longer."""
    size = min(len(one), len(other))
    return not size or one[-size:] == other[-size:]

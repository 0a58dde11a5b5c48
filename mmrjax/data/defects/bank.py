"""Labelled defects, from records or any folder of (picture, mask) pairs: the kind "real".

The masks may come from a data set or from another generator. The pictures must not be those of a
test split, since training sees their defects.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from mmrjax.data import geometry, tracks
from mmrjax.data.defects import synthesise, windows
from mmrjax.data.records import Records

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SIDE = 96  # px, of the squares that a preview cuts out; training cuts windows.LARGE_SIDE
MARGIN = 6  # px of context on each side of a defect; a painted core ends 5 px before the border
ANYWHERE = "any"  # part of a defect that may go on a picture of every part


def find_pairs(folder: str | pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Finds the (picture, mask) pairs of a folder and of its subfolders.

    The mask of a pair is the picture of no other pair. A mask has the picture's name, with or
    without `_mask` or `_gt`. A mask lies beside its picture (with another ending if the names are
    equal), or in a folder `masks`, `mask`, `gt` or `ground_truth` next to the picture's own folder,
    or as in MVTec AD: test/dent/x.png and ground_truth/dent/x_mask.png.

    Raises:
      ValueError: there is no such pair.
    """
    folder = pathlib.Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    known = {str(path).lower(): path for path in paths}
    pairs = [(p, m) for p in paths if (m := _mask_of(p, known)) is not None]
    masks = {mask for _, mask in pairs}
    pairs = [(picture, mask) for picture, mask in pairs if picture not in masks]
    if not pairs:
        raise ValueError(
            f"no pairs of picture and mask in {folder} ({len(paths)} pictures); expected "
            "x.jpg + x.png, x.png + x_mask.png, or images/x.png + masks/x.png"
        )
    return pairs


def _mask_of(picture: pathlib.Path, known: dict[str, pathlib.Path]) -> pathlib.Path | None:
    """The file of `known`, {path in lower case: path}, that is the picture's mask."""
    stem, parent = picture.stem, picture.parent
    beside = [parent / f"{stem}{mark}{e}" for mark in ("_mask", "_gt") for e in PICTURES]
    names = ("masks", "mask", "gt", "ground_truth")
    folders = [parent.parent / name for name in names]
    folders += [parent.parent.parent / name / parent.name for name in names]
    apart = [f / f"{stem}{m}{e}" for f in folders for m in ("", "_mask", "_gt") for e in PICTURES]
    # x.jpg + x.png: the lossless one is the mask.
    twin = [parent / f"{stem}.png"] if picture.suffix.lower() in (".jpg", ".jpeg") else []
    masks = (known.get(str(m).lower()) for m in (*beside, *apart, *twin))
    return next((m for m in masks if m not in (None, picture)), None)


def load_pairs(
    folder: str | pathlib.Path, view: geometry.View, whole_pictures: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields RGB uint8 [*view.frame, 3] and bool [*view.frame] of every pair.

    With `whole_pictures` no label vanishes in the view, however small.

    Raises:
      ValueError: a file cannot be read, the sizes of a pair differ, or a mask has values but none
        above 127.
    """
    for picture, mask in find_pairs(folder):
        image = cv2.imread(str(picture), cv2.IMREAD_COLOR_RGB)
        truth = cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE)
        for path, array in ((picture, image), (mask, truth)):
            if array is None:
                raise ValueError(f"{path} cannot be read as a picture")
        if image.shape[:2] != truth.shape:
            raise ValueError(f"{mask} is {truth.shape}, but {picture} is {image.shape[:2]}")
        if 0 < truth.max() <= 127:
            raise ValueError(
                f"{mask} has no value above {truth.max()}; expected 0 and, in the defect, 255"
            )
        yield _seen(image, truth, view, whole_pictures)


def _seen(
    image: np.ndarray, mask: np.ndarray, view: geometry.View, whole_pictures: bool = False
) -> tuple:
    """Picture and mask in the view; with `whole_pictures` the smallest label stays visible."""
    if whole_pictures:
        reach = [-(-n // side) for n, side in zip(mask.shape, view.resize, strict=True)]
        mask = cv2.dilate(mask, np.ones(reach, np.uint8))
    return (
        geometry.view_image(image, view.resize, view.frame, view.interpolation),
        geometry.view_mask(mask, view.resize, view.frame, "standard"),
    )


def make_bank(pairs, side: int = SIDE) -> tuple[synthesise.Bank, int]:
    """Cuts every defect out of its picture, one square per connected component.

    Args:
      pairs: yields (picture uint8 [h, w, 3], mask bool [h, w]) at the size that training sees.
      side: px of the squares.

    Returns:
      (bank, number of components that were left out, being too large for a square).

    Raises:
      ValueError: no defect fits.
    """
    images, masks, too_large, empty = [], [], 0, 0
    for image, mask in pairs:
        empty += not mask.any()
        cut, left_out = cut_out(image, mask, side)
        too_large += left_out
        images += [square for square, _ in cut]
        masks += [square for _, square in cut]
    if not images:
        raise ValueError(
            f"no defect of at most {side - 2 * MARGIN} px in the pairs ({too_large} are larger, "
            f"{empty} masks are empty)"
        )
    return synthesise.Bank(np.stack(images), np.stack(masks)), too_large


def cut_out(
    image: np.ndarray, mask: np.ndarray, side: int = SIDE
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Cuts the defects out of a picture, each in the middle of a square.

    Args:
      image: uint8 [h, w, 3].
      mask: bool [h, w].
      side: px of the squares.

    Returns:
      ([(uint8 [side, side, 3], bool [side, side])] of the connected components that fit with their
      margin, number of the components that do not fit).
    """
    squares, too_large = [], 0
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), None, None, 8)
    for i, (x, y, w, h, _) in enumerate(stats[1:].tolist(), start=1):
        if max(w, h) > side - 2 * MARGIN:
            too_large += 1
            continue
        top, left = y + h // 2 - side // 2, x + w // 2 - side // 2
        own = (labels == i).astype(np.uint8)
        squares.append(
            (
                _cut(image, top, left, side, cv2.BORDER_REPLICATE),
                _cut(own, top, left, side, cv2.BORDER_CONSTANT) > 0,
            )
        )
    return squares, too_large


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Defects of the records of a training side, or of a folder: cut out, or in whole pictures.

    Attributes:
      bank: the m defects.
      part: str [m], "<dataset>/<category>" of each defect, or ANYWHERE.
      defect: str [m], the type of each defect.
      domain: str [m], the domain of its record; "" from a folder.
      left_out: number of defects that are too large to be cut out, or of whole pictures without a
        defect in view.
    """

    bank: synthesise.Bank
    part: np.ndarray
    defect: np.ndarray
    domain: np.ndarray
    left_out: int

    def chances(self, parts: Sequence[str], domains: Sequence[str] | None = None) -> np.ndarray:
        """How likely each defect is on a picture of each part, float32 [parts, m].

        A picture gets defects of its own part and of ANYWHERE. All types are equally likely,
        however many defects a type has. With `domains`, str [parts], a picture gets defects of its
        own domain alone.
        """
        kinds = [self.part, self.defect] + ([] if domains is None else [self.domain])
        _, kind, count = np.unique(np.stack(kinds), axis=1, return_inverse=True, return_counts=True)
        is_own = (np.asarray(parts)[:, None] == self.part) | (self.part == ANYWHERE)
        if domains is not None:
            is_own &= np.asarray(domains)[:, None] == self.domain
        return (is_own / count[kind.reshape(-1)]).astype(np.float32)

    def select(self, usable: np.ndarray) -> "Labelled":
        """The defects that are `usable`, bool [m]; the others are left out."""
        bank = synthesise.Bank(*(array[usable] for array in self.bank))
        columns = (column[usable] for column in (self.part, self.defect, self.domain))
        return Labelled(bank, *columns, self.left_out + int((~usable).sum()))

    def counts(self) -> dict[str, dict[str, int]]:
        """{part: {type: number of defects}}."""
        counts: dict[str, dict[str, int]] = {}
        for part, defect in zip(self.part.tolist(), self.defect.tolist(), strict=True):
            own = counts.setdefault(part, {})
            own[defect] = own.get(defect, 0) + 1
        return counts


def from_records(
    records: Records, view: geometry.View, whole_pictures: bool = False
) -> Labelled | None:
    """The labelled defects of records, at the size that training sees.

    Args:
      records: defective ones of the training side; records without pixel truth give no defect.
      view: how evaluation, and training but for its crops, looks at the pictures.
      whole_pictures: keep the pictures as they are; else each defect is cut out of its picture.

    Returns:
      The defects; None if no record has one (that fits).
    """
    pictures, rows, left_out = [], [], 0
    for i in np.flatnonzero(records.table["has_mask"]).tolist():
        seen = _seen(records.image(i), records.mask(i), view, whole_pictures)
        if whole_pictures:
            own, missing = ([seen], 0) if seen[1].any() else ([], 1)
        else:
            own, missing = cut_out(*seen, windows.LARGE_SIDE)
        pictures, left_out = pictures + own, left_out + missing
        rows += [i] * len(own)
    if not pictures:
        return None
    bank = synthesise.Bank(*map(np.stack, zip(*pictures, strict=True)))
    columns = (tracks.part_of(records), records.table["defect"], records.table["domain"])
    return Labelled(bank, *(column[rows] for column in columns), left_out)


def from_folder(
    folder: str | pathlib.Path, view: geometry.View, whole_pictures: bool = False
) -> Labelled:
    """The defects of a folder of pairs (`find_pairs`), for pictures of every part.

    `view` and `whole_pictures` are those of `from_records`.

    Raises:
      ValueError: there is no pair, one cannot be read, or none has a defect (that fits).
    """
    pairs = load_pairs(folder, view, whole_pictures)
    if whole_pictures:
        pairs = list(pairs)
        marked = [pair for pair in pairs if pair[1].any()]
        if not marked:
            raise ValueError(f"{folder} has {len(pairs)} pairs, and no mask with a defect in view")
        bank = synthesise.Bank(*map(np.stack, zip(*marked, strict=True)))
        left_out = len(pairs) - len(marked)
    else:
        bank, left_out = make_bank(pairs, windows.LARGE_SIDE)
    columns = ([name] * len(bank.images) for name in (ANYWHERE, pathlib.Path(folder).name, ""))
    return Labelled(bank, *map(np.array, columns), left_out)


def joined(sources: Sequence[Labelled]) -> Labelled:
    """The defects of several sources together."""
    arrays = [(*source.bank, source.part, source.defect, source.domain) for source in sources]
    images, masks, *columns = map(np.concatenate, zip(*arrays, strict=True))
    left_out = sum(source.left_out for source in sources)
    return Labelled(synthesise.Bank(images, masks), *columns, left_out)


def _cut(array: np.ndarray, top: int, left: int, side: int, border: int) -> np.ndarray:
    padded = cv2.copyMakeBorder(array, side, side, side, side, border)
    return padded[top + side : top + 2 * side, left + side : left + 2 * side]

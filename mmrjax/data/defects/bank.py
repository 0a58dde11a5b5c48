"""Labelled defects, from records or any folder of (picture, mask) pairs, for cut-and-blend.

This is the kind "real". The masks may come from a data set or from another generator. Never give it
pictures of a test split: what is trained on must not be tested on.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from mmrjax.data import geometry, tracks
from mmrjax.data.defects import synthesise
from mmrjax.data.records import Records

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SIDE = 96  # px, of a bank's pictures
WHOLE = synthesise.LARGE_WINDOW  # of one with all that can be blended
MARGIN = 6  # px of context that every defect keeps on each side; what is painted ends 5 px before
ANYWHERE = "any"  # part of a defect that may go on a picture of every part


def find_pairs(folder: str | pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Finds the (picture, mask) pairs of a folder and of what lies below it.

    What is the mask of a pair is the picture of none. A mask has the picture's name, with or
    without `_mask` or `_gt`, and lies beside it (with another ending where the names are equal) or
    in a folder `masks`, `mask`, `gt` or `ground_truth` next to the picture's own folder, or, as in
    MVTec AD, test/dent/x.png and ground_truth/dent/x_mask.png.

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
    found = (known.get(str(m).lower()) for m in (*beside, *apart, *twin))
    return next((m for m in found if m not in (None, picture)), None)


def load_pairs(
    folder: str | pathlib.Path, view: geometry.View, whole: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields RGB uint8 [*view.frame, 3] and bool [*view.frame] of every pair.

    With `whole` no label vanishes in the view, however small.

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
        yield _seen(image, truth, view, whole)


def _seen(image: np.ndarray, mask: np.ndarray, view: geometry.View, whole: bool = False) -> tuple:
    """Picture and mask in the view; with `whole` no label vanishes in it, however small."""
    if whole:
        reach = [-(-n // side) for n, side in zip(mask.shape, view.resize, strict=True)]
        mask = cv2.dilate(mask, np.ones(reach, np.uint8))
    return (
        geometry.view_image(image, view.resize, view.frame, view.interpolation),
        geometry.view_mask(mask, view.resize, view.frame, "standard"),
    )


def make_bank(pairs, side: int = SIDE) -> tuple[synthesise.Bank, int]:
    """Cuts every defect out of its picture, one square per connected component.

    Args:
      pairs: of (uint8 [h, w, 3], bool [h, w]), all at the size that training sees.
      side: px of the squares.

    Returns:
      (bank, number of components that were too large for it and left out).

    Raises:
      ValueError: no defect fits.
    """
    images, masks, too_large, empty = [], [], 0, 0
    for image, mask in pairs:
        empty += not mask.any()
        cut, left_out = cut_out(image, mask, side)
        too_large += left_out
        images += [one for one, _ in cut]
        masks += [own for _, own in cut]
    if not images:
        raise ValueError(
            f"no defect of at most {side - 2 * MARGIN} px in the pairs ({too_large} are larger, "
            f"{empty} masks are empty)"
        )
    return synthesise.Bank(np.stack(images), np.stack(masks)), too_large


def cut_out(
    image: np.ndarray, mask: np.ndarray, side: int = SIDE
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """The defects of one picture, each in the middle of a square.

    Args:
      image: uint8 [h, w, 3].
      mask: bool [h, w].
      side: px of the squares.

    Returns:
      ((uint8 [side, side, 3], bool [side, side]) per connected component that fits with its margin,
      number of those that do not).
    """
    found, too_large = [], 0
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), None, None, 8)
    for i, (x, y, w, h, _) in enumerate(stats[1:].tolist(), start=1):
        if max(w, h) > side - 2 * MARGIN:
            too_large += 1
            continue
        top, left = y + h // 2 - side // 2, x + w // 2 - side // 2
        own = (labels == i).astype(np.uint8)
        found.append(
            (
                _cut(image, top, left, side, cv2.BORDER_REPLICATE),
                _cut(own, top, left, side, cv2.BORDER_CONSTANT) > 0,
            )
        )
    return found, too_large


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Defects of the records of a training side, or of a folder: cut out, or in whole pictures.

    Attributes:
      bank: the m defects.
      part: str [m], "<dataset>/<category>" of each, or ANYWHERE.
      defect: str [m], its type.
      domain: str [m], that of its record; "" from a folder.
      left_out: how many were: too large to be cut out; of whole pictures, without any in view.
    """

    bank: synthesise.Bank
    part: np.ndarray
    defect: np.ndarray
    domain: np.ndarray
    left_out: int

    def chances(self, parts: Sequence[str], domains: Sequence[str] | None = None) -> np.ndarray:
        """How likely each defect is on a picture of each part, float32 [parts, m].

        Defects of the same part and of ANYWHERE; every type alike, however many there are of it.
        With `domains`, one for each of `parts`, those alone whose record is of that domain.
        """
        kinds = [self.part, self.defect] + ([] if domains is None else [self.domain])
        _, kind, count = np.unique(np.stack(kinds), axis=1, return_inverse=True, return_counts=True)
        is_own = (np.asarray(parts)[:, None] == self.part) | (self.part == ANYWHERE)
        if domains is not None:
            is_own &= np.asarray(domains)[:, None] == self.domain
        return (is_own / count[kind.reshape(-1)]).astype(np.float32)

    def only(self, kept: np.ndarray) -> "Labelled":
        """Those where `kept`, bool [m]; the others are left out."""
        bank = synthesise.Bank(*(array[kept] for array in self.bank))
        columns = (column[kept] for column in (self.part, self.defect, self.domain))
        return Labelled(bank, *columns, self.left_out + int((~kept).sum()))

    def counts(self) -> dict[str, dict[str, int]]:
        """{part: {type: number of defects}}."""
        counts: dict[str, dict[str, int]] = {}
        for part, defect in zip(self.part.tolist(), self.defect.tolist(), strict=True):
            own = counts.setdefault(part, {})
            own[defect] = own.get(defect, 0) + 1
        return counts


def from_records(records: Records, view: geometry.View, whole: bool = False) -> Labelled | None:
    """The labelled defects of records, at the size that training sees.

    Args:
      records: defective ones of the training side; those without pixel truth give nothing.
      view: how evaluation, and training but for its crops, looks at them.
      whole: keep the pictures as they are; else each defect is cut out of its own.

    Returns:
      The defects; None where no record has one (that fits).
    """
    part, has_mask = tracks.part_of(records), records.table["has_mask"]
    kept, own_rows, left_out = [], [], 0
    for i in range(len(records)):
        if not has_mask[i]:
            continue
        seen = _seen(records.image(i), records.mask(i), view, whole)
        if whole:
            own, missing = ([seen], 0) if seen[1].any() else ([], 1)
        else:
            own, missing = cut_out(*seen, WHOLE)  # all that can be blended
        kept, left_out = kept + own, left_out + missing
        own_rows += [i] * len(own)
    if not kept:
        return None
    bank = synthesise.Bank(*(np.stack(arrays) for arrays in zip(*kept, strict=True)))
    columns = (column[own_rows] for column in (part, *map(records.table.get, ("defect", "domain"))))
    return Labelled(bank, *columns, left_out)


def from_folder(folder: str | pathlib.Path, view: geometry.View, whole: bool = False) -> Labelled:
    """The defects of a folder of pairs (`find_pairs`), for pictures of every part.

    `whole` is that of `from_records`.

    Raises:
      ValueError: there is no pair, one cannot be read, or none has a defect (that fits).
    """
    pairs = load_pairs(folder, view, whole)
    if whole:
        pairs = list(pairs)
        marked = [pair for pair in pairs if pair[1].any()]
        if not marked:
            raise ValueError(f"{folder} has {len(pairs)} pairs, and no mask with a defect in view")
        bank = synthesise.Bank(*map(np.stack, zip(*marked, strict=True)))
        left_out = len(pairs) - len(marked)
    else:
        bank, left_out = make_bank(pairs, WHOLE)
    columns = ([name] * len(bank.images) for name in (ANYWHERE, pathlib.Path(folder).name, ""))
    return Labelled(bank, *map(np.array, columns), left_out)


def joined(found: Sequence[Labelled]) -> Labelled:
    """The defects of several as one."""
    arrays = [(*one.bank, one.part, one.defect, one.domain) for one in found]
    images, masks, *columns = map(np.concatenate, zip(*arrays, strict=True))
    total = sum(one.left_out for one in found)
    return Labelled(synthesise.Bank(images, masks), *columns, total)


def _cut(array: np.ndarray, top: int, left: int, side: int, border: int) -> np.ndarray:
    padded = cv2.copyMakeBorder(array, side, side, side, side, border)
    return padded[top + side : top + 2 * side, left + side : left + 2 * side]

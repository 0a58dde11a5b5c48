"""Labelled defects, from records or any folder of (picture, mask) pairs, for cut-and-blend.

This is the kind "real". The masks may come from a data set or from another generator. Never give it
pictures of a test split: what is trained on must not be tested on.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from mmrjax.data import defects, geometry, tracks
from mmrjax.data.records import Records

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SIDE = 96  # px, of a bank's pictures
MARGIN = 4  # px of context that every defect keeps on each side


def find_pairs(folder: str | pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Finds the (picture, mask) pairs of a folder and of what lies below it.

    A mask has the picture's name, with or without `_mask` or `_gt`, and lies beside it (with
    another ending where the names are equal) or in a folder `masks`, `mask`, `gt` or
    `ground_truth` next to the picture's own folder.

    Raises:
      ValueError: there is no such pair.
    """
    folder = pathlib.Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    known = set(paths)
    pairs = [(p, m) for p in paths if (m := _mask_of(p, known)) is not None]
    if not pairs:
        raise ValueError(
            f"no pairs of picture and mask in {folder} ({len(paths)} pictures); expected "
            "x.jpg + x.png, x.png + x_mask.png, or images/x.png + masks/x.png"
        )
    return pairs


def _mask_of(picture: pathlib.Path, known: set[pathlib.Path]) -> pathlib.Path | None:
    stem, parent = picture.stem, picture.parent
    beside = [parent / f"{stem}{mark}{e}" for mark in ("_mask", "_gt") for e in PICTURES]
    folders = [parent.parent / name for name in ("masks", "mask", "gt", "ground_truth")]
    apart = [f / f"{stem}{m}{e}" for f in folders for m in ("", "_mask", "_gt") for e in PICTURES]
    # x.jpg + x.png: the lossless one is the mask.
    twin = [parent / f"{stem}.png"] if picture.suffix.lower() in (".jpg", ".jpeg") else []
    return next((m for m in (*beside, *apart, *twin) if m in known and m != picture), None)


def load_pairs(
    folder: str | pathlib.Path, size_hw: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields RGB uint8 [*size_hw, 3] and bool [*size_hw]; masks nearest, set above 127.

    Raises:
      ValueError: a file cannot be read, or the sizes of a pair differ.
    """
    for picture, mask in find_pairs(folder):
        image = cv2.imread(str(picture), cv2.IMREAD_COLOR_RGB)
        truth = cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE)
        for path, array in ((picture, image), (mask, truth)):
            if array is None:
                raise ValueError(f"{path} cannot be read as a picture")
        if image.shape[:2] != truth.shape:
            raise ValueError(f"{mask} is {truth.shape}, but {picture} is {image.shape[:2]}")
        wh = size_hw[::-1]
        image = cv2.resize(image, wh, interpolation=cv2.INTER_AREA)
        yield image, cv2.resize(truth, wh, interpolation=cv2.INTER_NEAREST) > 127


def make_bank(pairs, side: int = SIDE) -> tuple[defects.Bank, int]:
    """Cuts every defect out of its picture, one square per connected component.

    Args:
      pairs: of (uint8 [h, w, 3], bool [h, w]), all at the size that training sees.
      side: px of the squares.

    Returns:
      (bank, number of components that were too large for it and left out).

    Raises:
      ValueError: no defect fits.
    """
    images, masks, too_large = [], [], 0
    for image, mask in pairs:
        cut, left_out = cut_out(image, mask, side)
        too_large += left_out
        images += [one for one, _ in cut]
        masks += [own for _, own in cut]
    if not images:
        raise ValueError(
            f"no defect of at most {side - 2 * MARGIN} px in the pairs ({too_large} are larger)"
        )
    return defects.Bank(np.stack(images), np.stack(masks)), too_large


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
    """Defects cut out of the records of a training side.

    Attributes:
      bank: the m defects.
      part: str [m], "<dataset>/<category>" of each.
      defect: str [m], its type.
      too_large: how many were left out.
    """

    bank: defects.Bank
    part: np.ndarray
    defect: np.ndarray
    too_large: int

    def chances(self, parts: Sequence[str]) -> np.ndarray:
        """How likely each defect is on a picture of each part, float32 [parts, m].

        Only defects of the same part; every type of it alike, however many there are of it.
        """
        _, kind, count = np.unique(
            np.stack([self.part, self.defect]), axis=1, return_inverse=True, return_counts=True
        )
        is_own = np.asarray(parts)[:, None] == self.part
        return (is_own / count[kind.reshape(-1)]).astype(np.float32)

    def counts(self) -> dict[str, dict[str, int]]:
        """{part: {type: number of defects}}."""
        counts: dict[str, dict[str, int]] = {}
        for part, defect in zip(self.part.tolist(), self.defect.tolist(), strict=True):
            own = counts.setdefault(part, {})
            own[defect] = own.get(defect, 0) + 1
        return counts


def from_records(records: Records, rows: Sequence[int], view: geometry.View) -> Labelled | None:
    """Cuts the labelled defects out of some records, at the size that training sees.

    Args:
      records: of a category, or joined ones.
      rows: defective ones of the training side; without pixel truth they give nothing.
      view: how evaluation, and training but for its crops, looks at them.

    Returns:
      The defects; None where no record has one that fits.
    """
    part, has_mask = tracks.part_of(records), records.table["has_mask"]
    cut, parts, kinds, too_large = [], [], [], 0
    for i in rows:
        if not has_mask[i]:
            continue
        image = geometry.view_image(records.image(i), view.resize, view.frame, view.interpolation)
        mask = geometry.view_mask(records.mask(i), view.resize, view.frame, "standard")
        own, left_out = cut_out(image, mask, defects.LARGE_WINDOW)  # all that can be blended
        cut, too_large = cut + own, too_large + left_out
        parts += [str(part[i])] * len(own)
        kinds += [str(records.table["defect"][i])] * len(own)
    if not cut:
        return None
    bank = defects.Bank(*(np.stack(arrays) for arrays in zip(*cut, strict=True)))
    return Labelled(bank, np.array(parts), np.array(kinds), too_large)


def _cut(array: np.ndarray, top: int, left: int, side: int, border: int) -> np.ndarray:
    padded = cv2.copyMakeBorder(array, side, side, side, side, border)
    return padded[top + side : top + 2 * side, left + side : left + 2 * side]

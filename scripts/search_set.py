"""The data on which settings are searched: training tiles kept apart, with defects of another make.

Used by `scripts/search.py make`. Nothing of the test is read. The good training images are split by
group (three quarters train, a quarter is tested), and every tested image comes again with one
defect. Their kinds must not be what data/defects/synthesise.py blends into training images, or the
search would ask for what was taught. So they are drawn by other code. Small ones: five kinds of
damage that the embedded teacher was pretrained with (procedural/scenes.py), a piece of another tile
set in with a sharp border, and a frayed edge. Large ones: a region or a strip across the tile where
its own surface is lighter or darker, smoother or rougher. Nothing is Poisson-blended.
"""

import csv
import io
import pathlib
from collections.abc import Callable

import cv2
import numpy as np
from procedural import scenes, textures

from data_builders import build
from mmrjax.data import records as records_lib
from mmrjax.data import splits
from mmrjax.data.defects import preview
from mmrjax.runtime import files

DRAWN = ("crack", "pit", "chip", "smear", "warp")  # as scenes.DAMAGE
SMALL = (*DRAWN, "patch", "fray")
LARGE = ("shade", "band")
KINDS = (*SMALL, *LARGE)
HELD_OUT = 0.25  # of the groups
CHANGED = 4  # grey levels from which a pixel belongs to the mask
TRIES = 16  # draws, of which the nearest to the wanted side is taken
# Of small kinds.
SMALLEST, LARGEST = 4.0, 0.25  # side of a defect: px, share of the tile's shorter side
CONTRAST = (14.0, 80.0)  # mean change of a defect's pixels, in grey levels; from faint to plain
GAIN = 4.0  # by which a change may be strengthened for it; what is fainter stays so
# Of large kinds; good tiles differ by 25 grey levels in light, their texture by 6 from its mean.
AREA = (0.1, 0.6)  # share of the tile
PIECE = 0.02  # share of the tile from which a part counts: the fringe would be full of tiny defects
LIGHT = (8.0, 48.0)  # grey levels by which a region is lighter or darker
TEXTURE = (1.7, 3.5)  # factor by which its texture is stronger or weaker
SOFT = (0.5, 12.0)  # standard deviation of the border's blur, px
QUALITY = 90  # of the JPEG files: good and defective ones alike, or the format tells them apart
SHEETS = 44  # textures that a chip may show

Rng = np.random.Generator


def make(data_dir: str, output: pathlib.Path, copies: int, seed: int) -> str:
    """Writes the set as a folder for data_builders/folder, and returns what it holds, in words.

    Args:
      data_dir: where the records of magnetic_tile lie.
      output: folder, absent or empty.
      copies: defective images of each tested good one.
      seed: of the split and of all defects; image by image, so the order does not matter.

    Raises:
      ValueError: `output` is not empty. FileNotFoundError: no records.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output={output} is there already; name another folder, or remove it")
    (directory,) = build.build("magnetic_tile", None, data_dir).values()
    records = records_lib.load(directory)
    good, _ = splits.select(records, "one_class")
    train, held_out = splits.hold_out(records, good, HELD_OUT, seed)
    if not len(held_out):
        raise ValueError(f"{directory}: too few groups of good tiles to keep a quarter apart")
    sheets = np.stack([textures.sheet(seed, label) for label in range(SHEETS)])
    kinds = np.arange(len(held_out) * copies) % len(KINDS)
    kinds = np.random.default_rng(seed).permutation(kinds).reshape(-1, copies)
    rows = [_write(output, "train/good", "", records, i, grey(records, i)) for i in train]
    for i, own in zip(held_out, kinds, strict=True):
        tile = grey(records, i)
        rows.append(_write(output, "test/good", "", records, i, tile))
        for copy, kind in enumerate(KINDS[k] for k in own):
            rng = np.random.default_rng([seed, int(i), copy])
            alike = held_out[records.table["domain"][held_out] == records.table["domain"][i]]
            donor = grey(records, int(rng.choice(alike)))
            painted, mask = defective(rng, tile, kind, donor, sheets)
            rows.append(_write(output, f"test/{kind}", f"_{copy}", records, i, painted))
            name = f"ground_truth/{kind}/{pathlib.Path(rows[-1][0]).stem}.png"
            _encode(output / name, 255 * mask.astype(np.uint8))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("image", "group", "domain"), *rows])
    files.write_text(output / "groups.csv", table.getvalue())
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return (
        f"{output}: {len(train)} good tiles to train on; {len(held_out)} good and {kinds.size} "
        f"defective ones to test, of {len(set(records.table['group'][held_out]))} other groups; "
        f"{size / 1e6:.1f} MB"
    )


def contact_sheet(folder: pathlib.Path, columns: int = 8, size: int = 224) -> np.ndarray:
    """Defects of each kind and below them their outlines, RGB uint8, to be looked at."""
    rows = []
    for kind in KINDS:
        paths = sorted((folder / "test" / kind).glob("*.jpg"))
        paths = paths[:: max(1, len(paths) // columns)][:columns]
        row = np.zeros((2, columns, size, size, 3), np.uint8)
        for i, path in enumerate(paths):
            mask = cv2.imread(str(folder / f"ground_truth/{kind}/{path.stem}.png"), 0)
            mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST)
            image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
            row[0, i] = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
            row[1, i] = preview.outline(row[0, i], mask > 0)
        rows += [np.concatenate(line, axis=1) for line in row]
    return np.concatenate(rows)


def grey(records: records_lib.Records, i: int) -> np.ndarray:
    """Record `i`, uint8 [h, w]; the tiles' three channels are equal."""
    return records.image(int(i))[..., 0]


def _write(output, folder, mark, records, i, image) -> tuple[str, str, str]:
    """Writes an image; its row of groups.csv."""
    stem = pathlib.Path(str(records.table["id"][i])).stem
    name = f"{folder}/{stem}{mark}.jpg"
    _encode(output / name, image)
    return name, str(records.table["group"][i]), str(records.table["domain"][i])


def _encode(path: pathlib.Path, image: np.ndarray) -> None:
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY] if path.suffix == ".jpg" else []
    files.write_bytes(path, cv2.imencode(path.suffix, image, options)[1].tobytes())


def defective(
    rng: Rng, tile: np.ndarray, kind: str, donor: np.ndarray, sheets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One defect on a tile.

    Args:
      rng: generator of everything.
      tile: uint8 [h, w], both sides at least scenes.SIZE.
      kind: one of KINDS.
      donor: uint8 [h', w'], another tile, from which a patch is cut.
      sheets: uint8 [classes, side, side], from `textures.sheet`.

    Returns:
      The tile with the defect, uint8 [h, w], and bool [h, w], where it is. Sides of small defects
      are spread from SMALLEST to LARGEST as far as the kind reaches, mean changes over CONTRAST;
      large ones cover a share of AREA.

    Raises:
      ValueError: the tile is so plain that a defect of this kind does not show.
    """
    before, donor = tile.astype(np.float32), donor.astype(np.float32)
    made = _large(rng, before, kind) if kind in LARGE else _small(rng, before, kind, donor, sheets)
    if made is None:
        raise ValueError(f"no {kind} can be seen on a tile of grey level {before.mean():.0f}")
    return made


def _small(rng, before, kind, donor, sheets) -> tuple[np.ndarray, np.ndarray] | None:
    """As `defective` returns it; None if nothing shows."""
    # Evenly on logarithmic scales, of sides the larger ones more often.
    wanted = SMALLEST * (LARGEST * min(before.shape) / SMALLEST) ** rng.uniform() ** 0.4
    contrast = np.exp(rng.uniform(*np.log(CONTRAST)))
    best, distance = None, np.inf
    for i in range(10 * TRIES):  # some draws are too faint, or cut off by their window
        change = _PAINTERS[kind](rng, before, wanted, donor, sheets) - before
        seen = np.abs(change) > 1
        gain = min(GAIN, contrast / (np.abs(change[seen]).mean() if seen.any() else 1.0))
        after = np.round(before + gain * change).clip(0, 255)
        mask = _changed(before, after)
        side = _side(mask)
        if side >= SMALLEST - 1 and abs(np.log(side / wanted)) < distance:
            best, distance = (after.astype(np.uint8), mask), abs(np.log(side / wanted))
        if best and i >= TRIES - 1:
            return best
    return None


def _changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Pixels that differ visibly, without the gaps that a texture leaves: bool [h, w]."""
    changed = (np.abs(after - before) > CHANGED).astype(np.uint8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    closed = cv2.morphologyEx(cv2.copyMakeBorder(changed, *(4 * [4]), cv2.BORDER_CONSTANT),
                              cv2.MORPH_CLOSE, kernel)[4:-4, 4:-4]  # fmt: skip
    return _pieces(closed, 4)


def _pieces(mask: np.ndarray, least: float) -> np.ndarray:
    """Of a mask, uint8 [h, w], the connected parts of at least so many pixels: bool [h, w]."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    is_kept = stats[:, cv2.CC_STAT_AREA] >= least
    is_kept[0] = False  # outside the mask
    return is_kept[labels]


def _side(mask: np.ndarray) -> int:
    """The larger side of the mask's bounding box; 0 for an empty one."""
    return max(cv2.boundingRect(mask.astype(np.uint8))[2:])


def _drawn(kind: str) -> Callable[..., np.ndarray]:
    """A painter that damages a window of the tile as the pretraining's pictures are."""

    def paint(rng, before, wanted, donor, sheets) -> np.ndarray:
        n = scenes.SIZE
        y, x = (int(rng.integers(side - n + 1)) for side in before.shape)
        window = np.repeat(before[y : y + n, x : x + n, None], 3, axis=2)
        painted = scenes.damaged(rng, window.copy(), kind, sheets)[0].mean(axis=-1)
        after = before.copy()
        after[y : y + n, x : x + n] = painted
        rim = np.zeros(before.shape, bool)  # of the window, where that is not the tile's
        rim[y : y + n, x : x + n] = True
        rim[y + 1 : y + n - 1, x + 1 : x + n - 1] = False
        rim[[0, -1]] = rim[:, [0, -1]] = False
        return before if (np.abs(after - before) > 1)[rim].any() else after

    return paint


def _patch(rng, before, wanted, donor, sheets) -> np.ndarray:
    """A turned rectangle of another tile, with a sharp border."""
    angle = rng.uniform(0, np.pi)
    sides = wanted * np.array([1.0, rng.uniform(0.3, 1.0)])
    middle = rng.uniform(0, 1, 2) * before.shape[::-1]
    box = cv2.boxPoints((middle.tolist(), sides.tolist(), np.rad2deg(angle)))
    share = np.zeros(before.shape, np.float32)
    cv2.fillPoly(share, [np.round(16 * box).astype(np.int32)], 1.0, cv2.LINE_AA, 4)
    other = np.rot90(donor, rng.integers(4))
    y, x = (int(rng.integers(side)) for side in other.shape)
    other = np.pad(other, [(0, side) for side in before.shape], "wrap")
    return before + share * (other[y:, x:][: before.shape[0], : before.shape[1]] - before)


def _fray(rng, before, wanted, donor, sheets) -> np.ndarray:
    """A stretch of an edge pulled out in fibres: smeared across the edge, darker or brighter."""
    turns = int(rng.integers(4))
    tile = np.rot90(before, turns)  # the edge is at the top
    h, w = tile.shape
    start = rng.uniform(-0.3 * wanted, w - 0.7 * wanted)
    along = np.clip((np.arange(w) - start) / wanted, 0, 1)
    fibres = cv2.GaussianBlur(rng.uniform(0, 1, (1, w)).astype(np.float32), (0, 0), 1.2)[0]
    fibres = (fibres - fibres.min()) / (np.ptp(fibres) + 1e-6)
    deep = wanted * rng.uniform(0.3, 0.9) * np.sin(np.pi * along) * (0.3 + 0.7 * fibres)
    share = np.clip(deep[None] - np.arange(h)[:, None], 0, 1)
    pulled = cv2.blur(tile, (1, 2 * int(wanted / 4) + 3)) * (1 + 0.5 * (fibres[None] - 0.5))
    pulled = pulled * rng.choice((0.55, 0.75, 1.3)) + 4 * rng.standard_normal((h, w))
    return np.rot90(tile + share * (pulled - tile), -turns).astype(np.float32)


def _large(rng, before, kind) -> tuple[np.ndarray, np.ndarray] | None:
    """As `defective` returns it; None if nothing shows."""
    for _ in range(10 * TRIES):  # dark and plain tiles hide some draws
        cover = _cover(rng, before.shape, kind)
        after = np.round(before + cover * (_resurfaced(rng, before) - before)).clip(0, 255)
        # The mean around a pixel: single ones of a changed texture stay as they were.
        mask = (cv2.blur(np.abs(after - before), (17, 17)) > CHANGED) & (cover > 0.1)
        mask = _pieces(mask.astype(np.uint8), PIECE * mask.size)
        if AREA[0] <= mask.mean() <= AREA[1]:
            return after.astype(np.uint8), mask
    return None


def _cover(rng, shape: tuple[int, int], kind: str) -> np.ndarray:
    """How much of the changed surface shows at each pixel, in [0, 1]: float32 [h, w]."""
    side = min(shape)
    if kind == "shade":  # where a slow random field is high
        field = _noise(rng, shape, side * rng.uniform(0.18, 0.35))
        field += 0.12 * _noise(rng, shape, side / 40)
    else:  # near a wavy line along one of the tile's sides, a little askew
        angle = rng.choice((0, np.pi / 2)) + rng.normal(0, 0.15)
        y, x = (np.arange(n)[:, None] - rng.uniform(0, n) for n in shape)
        field = -np.abs(y * np.cos(angle) + x.T * np.sin(angle))
        field += 0.04 * side * _noise(rng, shape, side * rng.uniform(0.05, 0.2))
    share = np.exp(rng.uniform(*np.log(AREA)))
    region = (field > np.quantile(field, 1 - share)).astype(np.uint8)
    region = _pieces(region, PIECE * region.size).astype(np.float32)
    return cv2.GaussianBlur(region, (0, 0), np.exp(rng.uniform(*np.log(SOFT))))


def _resurfaced(rng, before) -> np.ndarray:
    """The whole tile in other light, with a stronger or weaker texture, or both."""
    which = rng.integers(3)
    light = rng.choice((-1, 1)) * np.exp(rng.uniform(*np.log(LIGHT)))
    factor = np.exp(rng.uniform(*np.log(TEXTURE))) ** rng.choice((-1, 1))
    ground = cv2.GaussianBlur(before, (0, 0), 4.0)
    texture = (1.0 if which == 0 else factor) * (before - ground)
    return ground + texture + (0.0 if which == 1 else light)


def _noise(rng, shape: tuple[int, int], sigma: float) -> np.ndarray:
    """Blurred noise of mean 0 and standard deviation 1: float32 [h, w]."""
    noise = rng.standard_normal(shape).astype(np.float32)
    noise = cv2.GaussianBlur(noise, (0, 0), sigma)
    return (noise - noise.mean()) / noise.std()


_PAINTERS = {**{kind: _drawn(kind) for kind in DRAWN}, "patch": _patch, "fray": _fray}

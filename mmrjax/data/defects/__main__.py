"""The contact sheet of `python -m mmrjax.data.defects --preview`.

The sheet has a row of good pictures with drawn defects for each kind, and their outlines below.
With `--recipe=perlin` the defects are foreign textures in the places of Perlin noise: drawn ones,
or those of --textures. Real defective pictures follow at the bottom for comparison, if a folder of
them is given.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import cv2
import jax
import numpy as np

from mmrjax.data import foreground, geometry
from mmrjax.data.defects import bank as defect_bank
from mmrjax.data.defects import perlin, textures, windows
from mmrjax.data.defects import synthesise as defects

GAP, LABEL = 3, 70  # px between pictures, and for the names at the left
BATCH = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line: draws the sheet and writes it to --output."""
    parser = argparse.ArgumentParser(
        prog="python -m mmrjax.data.defects", description="Shows what the generator draws."
    )
    parser.add_argument("--preview", action="store_true", required=True, help="write a sheet")
    parser.add_argument("--good", required=True, help="folder of pictures without defects")
    parser.add_argument("--real", default="", help="folder of defective pictures to compare with")
    parser.add_argument("--bank", default="", help="folder of (picture, mask) pairs to cut from")
    parser.add_argument("--recipe", choices=("poisson", "perlin"), default="poisson")
    parser.add_argument("--textures", default="", help="folder of textures for --recipe=perlin")
    parser.add_argument("--kinds", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--foreground", action="store_true", help="find the part first")
    parser.add_argument("--size", type=int, default=224, help="px of the pictures")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="defects.png")
    arguments = parser.parse_args(argv)
    try:
        sheet = (draw if arguments.recipe == "poisson" else draw_textures)(arguments)
    except ValueError as e:
        parser.error(str(e))
    if not cv2.imwrite(arguments.output, sheet[..., ::-1]):
        parser.error(f"{arguments.output} cannot be written")
    return 0


def draw(arguments: argparse.Namespace) -> np.ndarray:
    """The whole sheet, RGB uint8."""
    size = (arguments.size, arguments.size)
    kinds = tuple(filter(None, arguments.kinds.split(","))) or (
        *defects.TRAINING,
        *defects.HELD_OUT,
        *(("real",) if arguments.bank else ()),
    )
    pairs = (
        defect_bank.load_pairs(arguments.bank, geometry.View(size, size))
        if arguments.bank
        else None
    )
    bank = defect_bank.make_bank(pairs)[0] if pairs else None
    tiny = sum(kind in windows.TINY for kind in kinds)
    settings = defects.DefectSettings(kinds=kinds, tiny_share=tiny / len(kinds))
    good = pictures(arguments.good, size)
    drawn = _draw_each(good, settings, bank, arguments)
    rows = []
    for kind in kinds:
        images, masks = zip(*drawn[kind], strict=True) if drawn[kind] else ((), ())
        outlined = [outline(image, mask) for image, mask in zip(images, masks, strict=True)]
        rows += [_row(kind, images, arguments), _row("", outlined, arguments)]
    return np.concatenate(rows + _real_rows(arguments))


def draw_textures(arguments: argparse.Namespace) -> np.ndarray:
    """The sheet of `--recipe=perlin`, RGB uint8: anywhere, then on the part."""
    size, columns = (arguments.size, arguments.size), arguments.columns
    bank, _ = textures.make(arguments.textures, size, arguments.seed)
    good, rows = pictures(arguments.good, size), []
    rng = np.random.default_rng(arguments.seed)
    recipes = {"anywhere": perlin.Recipe(on_part=0.0), "on the part": perlin.Recipe(on_part=1.0)}
    for i, name in enumerate(2 * list(recipes) if arguments.foreground else 3 * ["anywhere"]):
        images = good[rng.integers(0, len(good), columns)]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(arguments.seed), i), columns)
        batch = {"image": geometry.to_unit(images), "keys": keys}
        if arguments.foreground:
            batch["foreground"] = np.stack([foreground.foreground(image) for image in images])
        drawn = jax.device_get(recipes[name].draw(batch, {"textures": bank}))
        shown = np.round(255 * drawn.images).astype(np.uint8)
        outlined = [outline(image, mask) for image, mask in zip(shown, drawn.mask, strict=True)]
        rows += [_row(name, shown, arguments), _row("", outlined, arguments)]
    return np.concatenate(rows + _real_rows(arguments))


def _real_rows(arguments: argparse.Namespace) -> list[np.ndarray]:
    """Three rows of real defective pictures, if a folder of them is given."""
    if not arguments.real:
        return []
    rng = np.random.default_rng(arguments.seed)
    shown = pictures(arguments.real, (arguments.size, arguments.size))
    count = min(arguments.columns, len(shown))
    chosen = [rng.choice(len(shown), count, replace=False) for _ in range(3)]
    return [_row("(real)", shown[rows], arguments) for rows in chosen]


def _draw_each(good, settings, bank, arguments) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Up to `columns` (picture, mask) of each kind."""
    synthesise = jax.jit(defects.synthesise, static_argnames="settings")
    rng = np.random.default_rng(arguments.seed)
    drawn = {kind: [] for kind in settings.kinds}
    for step in range(4 * arguments.columns * len(drawn) // BATCH + 1):
        images = good[rng.integers(0, len(good), BATCH)]
        part = (
            np.stack([foreground.foreground(i) for i in images]) if arguments.foreground else None
        )
        key = jax.random.fold_in(jax.random.key(arguments.seed), step)
        batch = jax.device_get(synthesise(key, images, part, settings=settings, bank=bank))
        for image, mask, kind in zip(batch.pixels, batch.mask, batch.kind, strict=True):
            if kind != defects.NONE and len(drawn[defects.KINDS[kind]]) < arguments.columns:
                drawn[defects.KINDS[kind]].append((image.astype(np.uint8), mask))
        if min(map(len, drawn.values())) == arguments.columns:
            break
    return drawn


def pictures(folder: str, size_hw: tuple[int, int]) -> np.ndarray:
    """All pictures below a folder but masks (x.png beside x.jpg), uint8 [n, *size_hw, 3] RGB."""
    paths = sorted(
        p for p in pathlib.Path(folder).rglob("*") if p.suffix.lower() in defect_bank.PICTURES
    )
    paths = [p for p in paths if not (p.suffix == ".png" and p.with_suffix(".jpg").exists())]
    images = [cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in paths]
    images = [image for image in images if image is not None]
    if not images:
        raise ValueError(f"no pictures in {folder!r}")
    return np.stack([cv2.resize(i, size_hw[::-1], interpolation=cv2.INTER_AREA) for i in images])


def outline(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with a red line around its mask, 4 px away."""
    around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8))
    lines, _ = cv2.findContours(around, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), lines, -1, (255, 0, 0), 1)


def _row(name: str, images: Sequence[np.ndarray], arguments: argparse.Namespace) -> np.ndarray:
    step = arguments.size + GAP
    row = np.zeros((step, LABEL + arguments.columns * step, 3), np.uint8)
    font = cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(row, name, (3, arguments.size // 2), font, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
    for i, image in enumerate(images[: arguments.columns]):
        left = LABEL + i * step
        row[: arguments.size, left : left + arguments.size] = image
    return row


if __name__ == "__main__":
    sys.exit(main())

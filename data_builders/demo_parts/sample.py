"""One image of the data set: what it shows, its pixels and its exact mask.

Every image has its own generators, keyed by (seed, index, purpose): it comes out the same whether
it is drawn alone, in any order or in several processes. A defective image is photographed twice,
damaged and undamaged in the same studio; its mask is where changed surface shows and looks
different.
Called by `demo_parts_dataset_builder`; no file is read or written.
"""

import dataclasses

import cv2
import numpy as np

from data_builders.demo_parts import defects, part, render, table_top
from data_builders.demo_parts import scene as scene_lib

SEED = 2024
TRAIN_GOOD = 240
TEST_GOOD = 30  # per domain
# Longest side of a defect's bounding box in pixels: at least, below. Tiny ones fit in both sides.
SIZES = {"tiny": (3, 10), "small": (10, 25), "medium": (25, 60), "large": (60, 140)}
_MIX = {  # ten images of every defect and domain
    "groove": "tiny small medium tiny small large tiny medium small tiny".split(),
    "fracture": "tiny small medium medium large small medium tiny medium small".split(),
    "ablation": "tiny medium small large medium small medium tiny medium large".split(),
    "breakdown": "large medium large medium large medium large large medium large".split(),
}
_VISIBLE = 6.0  # grey levels; a smaller change is not part of the mask
_CLEAR = 24.0  # grey levels that the strongest pixels of a defect must reach
_ATTEMPTS = 40
_PURPOSES = ("scene", "part", "bench", "room", "noise", "size", "defect")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The content of an image; `index` is its place in the data set and keys its generators."""

    index: int
    split: str
    domain: str
    defect: str
    number: int
    size: str = ""

    @property
    def name(self) -> str:
        """The id of the image, such as "test/view/groove/003"."""
        parts = (self.split, self.domain, self.defect, f"{self.number:03d}")
        return "/".join(p for p in parts if p)


@dataclasses.dataclass
class Sample:
    """A finished image.

    Attributes:
      image: [256, 256, 3] uint8 RGB.
      mask: [256, 256] bool, the defect; empty for a good part.
      twin: the same part before the damage, same shape as `image`, with the same noise.
    """

    image: np.ndarray
    mask: np.ndarray
    twin: np.ndarray


def recipes() -> list[Recipe]:
    """All images in order: training, then the good and the defective ones of each domain."""
    plan = [("train", "", "good", n, "") for n in range(TRAIN_GOOD)]
    for domain in scene_lib.DOMAINS:
        plan += [("test", domain, "good", n, "") for n in range(TEST_GOOD)]
        for kind in defects.KINDS:
            plan += [("test", domain, kind, n, size) for n, size in enumerate(_MIX[kind])]
    return [Recipe(index, *row) for index, row in enumerate(plan)]


def make_sample(recipe: Recipe, seed: int = SEED) -> Sample:
    """Draws one image.

    Args:
      recipe: one of `recipes()`.
      seed: another number gives another data set of the same make-up.

    Raises:
      RuntimeError: no attempt gave a visible defect of the size asked for.
    """

    def generator(purpose: str, attempt: int = 0) -> np.random.Generator:
        return np.random.default_rng([seed, recipe.index, _PURPOSES.index(purpose), attempt])

    scene = scene_lib.draw_scene(generator("scene"), recipe.domain or "same", recipe.number)
    blade = part.make_blade(generator("part"))
    tile = table_top.make_tile(generator("bench"), scene.bench)
    studio = render.Studio(scene, tile, generator("room"))
    good = studio.photograph(blade.surface)
    twin = render.expose(good, scene, generator("noise"))
    if recipe.defect == "good":
        return Sample(twin, np.zeros(twin.shape[:2], bool), twin)
    photo, mask = _damaged(recipe, studio, blade, good, generator)
    return Sample(render.expose(photo, scene, generator("noise")), mask, twin)


def _damaged(
    recipe: Recipe, studio: render.Studio, blade: part.Blade, good: render.Photo, generator
):
    """Damages the blade until the defect has the size asked for and can be seen: photo and mask."""
    low, high = SIZES[recipe.size]
    wanted = generator("size").uniform(0.9 * low + 0.1 * high, 0.2 * low + 0.8 * high)
    factor = 2.0 / studio.scene.scale  # canvas pixels in a finished pixel
    for attempt in range(_ATTEMPTS):
        rng = generator("defect", attempt)
        surface, changed = defects.damage(rng, blade, recipe.defect, wanted * factor)
        photo = studio.photograph(surface)
        mask = difference_mask(good, photo, changed)
        side = longest_side(mask)
        if low <= side < high and _is_clear(good, photo, mask):
            return photo, mask
        factor *= float(np.clip(wanted / max(side, 1), 0.8, 1.2))
    raise RuntimeError(
        f"{recipe.name}: no visible {recipe.size} {recipe.defect} in {_ATTEMPTS} tries"
    )


def difference_mask(good: render.Photo, damaged: render.Photo, changed: np.ndarray) -> np.ndarray:
    """Pixels that show changed surface, before or after, and look different; inner holes filled.

    Args:
      good: the part before the damage.
      damaged: the same afterwards, in the same studio.
      changed: bool [h, w], the canvas points that the damage changed.

    Returns:
      bool [SIZE, SIZE].
    """
    shows = np.maximum(good.touches(changed), damaged.touches(changed)) > 0.02
    shows = cv2.dilate(shows.astype(np.uint8), np.ones((3, 3), np.uint8))  # the lens spreads it
    differs = np.abs(good.levels - damaged.levels).max(-1) > _VISIBLE
    mask = (differs & (shows > 0)).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    for i in range(1, count):
        if stats[i, cv2.CC_STAT_AREA] < 4:
            mask[labels == i] = 0
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(mask, outlines, -1, 1, cv2.FILLED)
    return mask.astype(bool)


def longest_side(mask: np.ndarray) -> int:
    """Longest side of the bounding box of a mask in pixels, 0 if it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(max(np.ptp(rows), np.ptp(columns))) + 1 if len(rows) else 0


def _is_clear(good: render.Photo, damaged: render.Photo, mask: np.ndarray) -> bool:
    """Whether a person would see the defect: at least six pixels of clear contrast."""
    contrast = np.abs(good.levels - damaged.levels).max(-1)[mask]
    return len(contrast) >= 6 and float(np.sort(contrast)[-6:].mean()) >= _CLEAR

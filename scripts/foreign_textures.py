"""Whether a run has learned to find foreign textures: AUROC on drawn ones that it has not seen.

python scripts/foreign_textures.py --workdir=runs/tile/mala/tile/seed54

Draws defects in Perlin's places, of textures that no training draws, into good training pictures of
the run, and scores these beside the pictures without defects. The same network with drawn weights
is the control. No test image is read. A run that finds them and fails on real defects has learned
its task, and the task does not transfer.
"""

import argparse
import dataclasses
import pathlib

import jax
import numpy as np

from mmrjax.data import geometry, tracks
from mmrjax.data.defects import perlin, textures
from mmrjax.metrics import ranking
from mmrjax.runs import detector, places, records, restore

UNSEEN = 1  # seed of the textures; training draws with 0


def main() -> None:
    """Runs the command line; prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=places.address)
    parser.add_argument("--pictures", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    loaded = detector.load(arguments.workdir)
    config = restore.read_config(restore.find_run(pathlib.Path(arguments.workdir)))
    images = training_pictures(config, loaded.view, arguments.pictures)
    spoilt, masks = draw(images, arguments.seed)
    method = loaded.trained.method
    drawn, _ = jax.jit(lambda key: method.init(key, {}))(jax.random.key(arguments.seed + 1))
    control = detector.Detector(
        dataclasses.replace(loaded.trained, variables={**loaded.trained.variables, **drawn}), config
    )
    print(f"{len(images)} pictures, a defect in each of their copies; AUROC in percent")
    for name, own in (("trained", loaded), ("drawn weights", control)):
        found = own.predict([*images, *spoilt])
        scores = np.array([one.score for one in found])
        maps = np.stack([one.view_map for one in found[len(images) :]])
        image = area(scores, np.repeat([False, True], len(images)))
        pixel = area(maps.ravel(), masks.ravel())
        print(f"{name:14} image {100 * image:5.1f}  pixel {100 * pixel:5.1f}")


def training_pictures(config, view: geometry.View, count: int) -> np.ndarray:
    """Good training pictures of a run in its view, evenly spaced, uint8 [n, h, w, 3]."""
    (whole,) = records.load_records(config)
    train = tracks.select(whole, config.data, config.train.seeds[0]).train
    rows = train[np.linspace(0, len(train) - 1, min(count, len(train))).round().astype(int)]
    how = view.resize, view.size, view.interpolation
    return np.stack([geometry.view_image(whole.image(row), *how) for row in rows])


def draw(images: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the pictures with a defect each, uint8; the defects, bool [n, h, w])."""
    bank = textures.draw(textures.DRAWN, images.shape[1:3], UNSEEN)
    keys = jax.random.split(jax.random.key(seed), len(images))
    recipe = perlin.Recipe(on_part=0.0)
    batch = {"image": geometry.to_unit(images), "keys": keys}
    drawn = jax.jit(lambda batch: recipe.draw(batch, {"textures": bank}))(batch)
    return np.round(255 * np.asarray(drawn.images)).astype(np.uint8), np.asarray(drawn.mask)


def area(scores: np.ndarray, is_defect: np.ndarray) -> float:
    """The area under the ROC curve."""
    return float(ranking.area(ranking.rank(scores[is_defect], np.sort(scores[~is_defect]))))


if __name__ == "__main__":
    main()

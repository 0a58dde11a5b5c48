"""The judge of settings: the test of a data set, or defects drawn on good training pictures.

`config.sweep.judge` names the judge. With "test" a run trains and tests as its protocol says. With
"held_out_defects" a run never reads the test. A quarter of the groups of good training pictures is
held out. The run is tested on those pictures and on copies of them, each with a drawn defect of a
kind that training does not use (defects/held_out.py).
"""

import dataclasses
import functools
import zlib

import cv2
import numpy as np
from ml_collections import ConfigDict

from mmrjax.data import splits, tracks
from mmrjax.data.defects import held_out
from mmrjax.data.records import ANOMALY, GOOD, Records

SHARE = 0.25  # of the groups of good training pictures
SEED = 0x1DEA  # of split and defects: all rows and seeds of a table are judged on the same pictures
EACH = 4  # defects of each kind at least: the pictures come several times if they are few


class Drawn:
    """Defective copies of good pictures, as a source of records: each is drawn when it is read.

    Attributes:
      rows: int [n], the good picture that each copy shows.
      kinds: str [n], the kind of its defect; all kinds come about equally often.
    """

    def __init__(self, good: Records, seed: int):
        """Plans the copies.

        Args:
          good: the pictures; a piece of another picture comes from one of the same part.
          seed: seeds all draws. A defect follows from the seed, the picture's id, the number of the
            copy and the kind.
        """
        self._copies = -(-EACH * len(held_out.KINDS) // len(good))
        self.rows = np.repeat(np.arange(len(good)), self._copies)
        order = np.random.default_rng(seed).permutation(len(self.rows))
        self.kinds = np.array(held_out.KINDS)[order % len(held_out.KINDS)]
        self._good, self._part, self._seed = good, tracks.part_of(good), seed
        self._last = functools.lru_cache(maxsize=1)(self._draw)  # image and mask are read in turn

    def __len__(self) -> int:
        """Number of copies."""
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, bytes]:
        """{"image": PNG, "mask": PNG} of copy `i`."""
        return self._last(int(i))

    def records(self) -> Records:
        """The copies as records of a test, with the columns of their pictures."""
        table = {name: column[self.rows] for name, column in self._good.table.items()}
        numbers = np.arange(len(self)) % self._copies
        names = zip(table["id"], self.kinds, numbers, strict=True)
        table |= {
            "id": np.array([f"{name}:{kind}{number}" for name, kind, number in names]),
            "split": np.full(len(self), "test"),
            "defect": self.kinds,
            "label": np.full(len(self), ANOMALY),
            "has_mask": np.ones(len(self), bool),
        }
        name = "drawn defects"
        places = [(name, i) for i in range(len(self))]
        return dataclasses.replace(self._good, table=table, _sources={name: self}, _rows=places)

    def _draw(self, i: int) -> dict[str, bytes]:
        row, kind, good = int(self.rows[i]), self.kinds[i], self._good
        name = zlib.crc32(str(good.table["id"][row]).encode())
        rng = np.random.default_rng([self._seed, name, i % self._copies])
        other = good.image(int(rng.choice(np.flatnonzero(self._part == self._part[row]))))
        image, mask = held_out.draw(rng, good.image(row), kind, other)
        pictures = {"image": image[..., ::-1], "mask": 255 * mask.astype(np.uint8)}
        quick = [cv2.IMWRITE_PNG_COMPRESSION, 1]
        return {k: cv2.imencode(".png", p, quick)[1].tobytes() for k, p in pictures.items()}


def select(records: Records, config: ConfigDict, seed: int) -> tuple[Records, tracks.Track]:
    """Selects what a run trains on and is tested on.

    Args:
      records: the records of a category, or joined records.
      config: with `sweep.judge` and the protocol in `data`.
      seed: the seed of the run.

    Returns:
      (records, indices into them). With "test" the records are those given. With
      "held_out_defects" they hold nothing but the training side and the drawn pictures.

    Raises:
      ValueError: as `tracks.select`; too few groups to hold a quarter out; the protocol mixes
        training and test pictures.
    """
    if config.sweep.judge == "test":
        return records, tracks.select(records, config.data, seed)
    side = records.take(_training_side(records, config.data, seed))
    is_judged = side.table["label"] == GOOD
    if config.data.protocol == "track_a":  # which tests one part alone
        is_judged &= tracks.part_of(side) == (config.data.target or tracks.part_of(records)[0])
    candidates = side.take(np.flatnonzero(is_judged))
    _, good = splits.hold_out(candidates, SHARE, SEED)
    if not len(good):
        raise ValueError(
            f"{records.dataset}/{records.category}: too few groups of good training pictures to "
            f"hold out a quarter, {len(set(candidates.table['group']))}; "
            f"sweep.judge=held_out_defects needs {round(splits.MIN_HELD_OUT / SHARE)}"
        )
    train = splits.apart(side, good)
    train.table["split"], good.table["split"] = (
        np.full(len(own), split) for own, split in ((train, "train"), (good, "test"))
    )
    judged = train.append(good).append(Drawn(good, SEED).records())
    trained, test = np.arange(len(train)), np.arange(len(train), len(judged))
    if config.data.protocol == "k_shot":
        trained, _ = splits.select(judged, "k_shot", config.data.shots, seed)
    return judged, tracks.Track(trained, test, test[:0])


def note(config: ConfigDict) -> str:
    """A sentence for the report of a run that was not tested on the test; "" for others."""
    if config.sweep.judge == "test":
        return ""
    return (
        "judged without the test: its pictures are good training pictures that were held out, and "
        "copies of them with drawn defects (sweep.judge=held_out_defects)"
    )


def _training_side(records: Records, data: ConfigDict, seed: int) -> np.ndarray:
    """Indices of what the protocol may train on, without a draw of few shots."""
    if data.protocol == "image_split":
        raise ValueError(
            "sweep.judge=held_out_defects: protocol image_split trains on good test pictures; "
            "choose another protocol"
        )
    if data.protocol == "k_shot":
        return splits.select(records, "one_class")[0]
    return tracks.select(records, data, seed).train

"""Reading records: metadata in memory, images decoded on demand.

The schema is written in data_builders/common.py and is the only contract between the two.
"""

import dataclasses
import pathlib

import cv2
import numpy as np
import tensorflow_datasets as tfds

GOOD, ANOMALY = 0, 1


@dataclasses.dataclass
class Records:
    """All records of one category, sorted by split and id.

    Attributes:
      dataset, category: names.
      table: columns of equal length: id, split, defect, domain, group (str), label (0 good, 1
        anomaly), has_mask (bool: False means no pixel truth, never no defect).
    """

    dataset: str
    category: str
    table: dict[str, np.ndarray]
    _sources: dict[str, object]
    _rows: list[tuple[str, int]]

    def __len__(self) -> int:
        """Number of records."""
        return len(self._rows)

    def image(self, i: int, max_side: int = 0) -> np.ndarray:
        """RGB uint8 [h, w, 3] at native size; shrunk when a side exceeds `max_side` > 0."""
        image = self._decode(i, "image", cv2.IMREAD_COLOR_RGB)
        longest = max(image.shape[:2])
        if 0 < max_side < longest:
            h, w = (max(1, round(n * max_side / longest)) for n in image.shape[:2])
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        return image

    def mask(self, i: int) -> np.ndarray:
        """Ground truth uint8 [h, w], 0 or 255, at native size."""
        return self._decode(i, "mask", cv2.IMREAD_GRAYSCALE)

    def encoded(self, i: int, field: str) -> bytes:
        """The encoded bytes of the "image" or the "mask" of record `i`."""
        split, row = self._rows[i]
        return self._sources[split][row][field]

    def _decode(self, i: int, field: str, flags: int) -> np.ndarray:
        data = np.frombuffer(self.encoded(i, field), np.uint8)
        # Orientation tags are ignored: masks were drawn on the stored pixels.
        array = cv2.imdecode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION)
        if array is None:
            raise ValueError(
                f"the {field} of record {self.table['id'][i]!r} cannot be decoded: the records are "
                "damaged; delete their folder and run again to rebuild them"
            )
        return array


def load(directory: str | pathlib.Path) -> Records:
    """Opens one record directory, `<data_dir>/<dataset>/<category>/<version>`.

    Raises:
      FileNotFoundError: no records there.
    """
    directory = pathlib.Path(directory)
    if not (directory / "dataset_info.json").is_file():
        raise FileNotFoundError(f"no records at {directory}")
    builder = tfds.builder_from_directory(str(directory))
    skip = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    sources = {s: builder.as_data_source(s, decoders=skip) for s in sorted(builder.info.splits)}
    rows, columns = [], []
    for split, source in sources.items():
        for row in range(len(source)):
            rows.append((split, row))
            columns.append(_columns(source[row], split))
    order = sorted(range(len(rows)), key=lambda i: (columns[i]["split"], columns[i]["id"]))
    names = columns[0] if columns else ()
    table = {name: np.array([columns[i][name] for i in order]) for name in names}
    dataset, category = directory.parent.parent.name, directory.parent.name
    return Records(dataset, category, table, sources, [rows[i] for i in order])


def _columns(record: dict, split: str) -> dict:
    text = {name: record[name].decode() for name in ("id", "defect", "domain", "group")}
    return {**text, "split": split, "label": record["label"], "has_mask": bool(record["has_mask"])}

"""Reading records: metadata in memory, images decoded on demand.

data_builders/common.py defines the schema, the only contract between builders and reading.
"""

import dataclasses
import hashlib
import io
import pathlib
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

GOOD, ANOMALY = 0, 1
FORMATS = ("PNG", "JPEG", "BMP")  # of records; Pillow opens no other


@dataclasses.dataclass
class Records:
    """All records of one category, sorted by split and id.

    Attributes:
      dataset, category: names.
      table: columns of equal length: id, split, defect, domain, group (str), label (0 good, 1
        anomaly), has_mask (bool: False means no pixel truth, never no defect).
      digest: hex text that changes when an id, a split, a label, an image or a mask of the stored
        records does; views of them share it.
    """

    dataset: str
    category: str
    table: dict[str, np.ndarray]
    digest: str
    _sources: dict[str, object]
    _rows: list[tuple[str, int]]

    def __len__(self) -> int:
        """Number of records."""
        return len(self._rows)

    def take(self, rows: Sequence[int]) -> "Records":
        """A view of some records, in the order of `rows`; images stay where they are."""
        rows = np.asarray(rows, int)
        table = {name: column[rows] for name, column in self.table.items()}
        own = [self._rows[i] for i in rows]
        sources = {name: self._sources[name] for name, _ in own if name in self._sources}
        return dataclasses.replace(self, table=table, _sources=sources, _rows=own)

    def append(self, other: "Records") -> "Records":
        """These records and, after them, others with the same columns.

        Sources of the same name are the same.
        """
        return dataclasses.replace(
            self,
            table={
                name: np.concatenate([own, other.table[name]]) for name, own in self.table.items()
            },
            _sources={**self._sources, **other._sources},
            _rows=self._rows + other._rows,
        )

    def image(self, i: int, max_side: int = 0) -> np.ndarray:
        """RGB uint8 [h, w, 3] at native size; shrunk when a side exceeds `max_side` > 0."""
        image = self._decode(i, "image", cv2.IMREAD_COLOR_RGB)
        h, w = shrunk_size(image.shape[:2], max_side)
        if (h, w) != image.shape[:2]:
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
        return image

    def size(self, i: int, max_side: int = 0) -> tuple[int, int]:
        """(height, width) of what `image` returns, from the header alone."""
        data = io.BytesIO(self.encoded(i, "image"))
        with Image.open(data, formats=FORMATS) as image:
            return shrunk_size(image.size[::-1], max_side)

    def mask(self, i: int) -> np.ndarray:
        """Ground truth uint8 [h, w], 0 or 255, at native size."""
        return self._decode(i, "mask", cv2.IMREAD_GRAYSCALE)

    def encoded(self, i: int, field: str) -> bytes:
        """The encoded bytes of the "image" or the "mask" of record `i`."""
        split, row = self._rows[i]
        try:
            return self._sources[split][row][field]
        except RuntimeError as e:  # ArrayRecord's: a block does not match its hash any more
            raise self._damaged(i, field, "read") from e

    def _decode(self, i: int, field: str, flags: int) -> np.ndarray:
        data = np.frombuffer(self.encoded(i, field), np.uint8)
        # Orientation tags are ignored: masks were drawn on the stored pixels.
        array = cv2.imdecode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION) if data.size else None
        if array is None:
            raise self._damaged(i, field, "decoded")
        return array

    def _damaged(self, i: int, field: str, verb: str) -> ValueError:
        return ValueError(
            f"the {field} of record '{self.table['id'][i]}' cannot be {verb}: the records are "
            "damaged; delete their folder and run again to rebuild them"
        )


def shrunk_size(size_hw: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(height, width) after the longer side is limited to `max_side` > 0."""
    longest = max(size_hw)
    if not 0 < max_side < longest:
        return tuple(size_hw)
    return tuple(max(1, round(n * max_side / longest)) for n in size_hw)


def load(directory: str | pathlib.Path) -> Records:
    """Opens one record directory, `<data_dir>/<dataset>/<category>/<version>`.

    Raises:
      FileNotFoundError: no records there.
      ValueError: a file of them is damaged.
    """
    directory = pathlib.Path(directory)
    if not (directory / "dataset_info.json").is_file():
        raise FileNotFoundError(f"no records at {directory}")
    try:
        sources, rows, columns = _read(directory)
    except Exception as e:  # TFDS and ArrayRecord raise whatever their parsers raise
        reason = " ".join(str(e).split())[:200]
        raise ValueError(
            f"the records in {directory} are damaged ({reason}); delete that folder and repeat the "
            "command to build them again"
        ) from e
    order = sorted(range(len(rows)), key=lambda i: (columns[i]["split"], columns[i]["id"]))
    names = [name for name in (columns[0] if columns else ()) if name != "_crc"]
    content = repr([(columns[i]["id"], columns[i]["split"], columns[i]["_crc"]) for i in order])
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    table = {name: np.array([columns[i][name] for i in order]) for name in names}
    dataset, category = directory.parent.parent.name, directory.parent.name
    return Records(dataset, category, table, digest, sources, [rows[i] for i in order])


def _read(directory: pathlib.Path) -> tuple[dict, list[tuple[str, int]], list[dict]]:
    """Reads every record: {split: source}, the (split, row) and the columns of each record."""
    import tensorflow_datasets as tfds  # not at the top: models run and are timed without it

    builder = tfds.builder_from_directory(str(directory))
    skip = {name: tfds.decode.SkipDecoding() for name in ("image", "mask")}
    sources = {s: builder.as_data_source(s, decoders=skip) for s in sorted(builder.info.splits)}
    rows, columns = [], []
    for split, source in sources.items():
        for row in range(len(source)):
            rows.append((split, row))
            record = source[row]
            if not record or record["image"] is None or record["mask"] is None:
                raise ValueError(f"record {row} of split {split!r} is empty")
            columns.append({**_columns(record, split), "_crc": _checksum(record)})
    return sources, rows, columns


def join(parts: Sequence[Records], category: str = "all") -> Records:
    """Joins the records of several categories or data sets, in the order given.

    The table gets a column `part`, "<dataset>/<category>". Equal names stay apart: groups begin
    with the part, and ids begin with the data set if there are several data sets.
    """
    names = [f"{part.dataset}/{part.category}" for part in parts]
    datasets = list(dict.fromkeys(part.dataset for part in parts))
    if not parts or len(set(names)) < len(names):
        raise ValueError(f"expected one or more different parts to join, found {names}")
    tables, sources, rows = [], {}, []
    for part, name in zip(parts, names, strict=True):
        prefix = f"{part.dataset}/" if len(datasets) > 1 else ""
        changed = {
            "part": np.full(len(part), name),
            "id": np.array([f"{prefix}{text}" for text in part.table["id"]], str),
            "group": np.array([f"{name}/{text}" for text in part.table["group"]], str),
        }
        tables.append({**part.table, **changed})
        sources |= {f"{name}/{split}": source for split, source in part._sources.items()}
        rows += [(f"{name}/{split}", row) for split, row in part._rows]
    table = {column: np.concatenate([own[column] for own in tables]) for column in tables[0]}
    digest = hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()[:16]
    return Records("+".join(datasets), category, table, digest, sources, rows)


def _checksum(record: dict) -> int:
    crc = zlib.crc32(record["mask"], zlib.crc32(record["image"]))
    return zlib.crc32(bytes([record["label"], record["has_mask"]]), crc)


def _columns(record: dict, split: str) -> dict:
    text = {name: record[name].decode() for name in ("id", "defect", "domain", "group")}
    return {**text, "split": split, "label": record["label"], "has_mask": bool(record["has_mask"])}

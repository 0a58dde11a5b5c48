"""Reads PyTorch's .pth files without torch, and without running anything that they name.

Both formats that `torch.save` has written since version 0.4: a legacy stream of pickles followed by
raw storages, and a zip archive of one pickle and one entry per storage. The unpickler admits the
names in `_Unpickler.find_class` alone and answers them with objects of this module that only note
what was asked; every other name is refused before it is looked up. A tensor's sizes and strides are
checked against its storage.
"""

import dataclasses
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a legacy stream
PROTOCOL = 1001  # its second pickle
WRAPPERS = ("model", "state_dict")  # entries in which training scripts put a state dict
STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Errors of pickle, zipfile and of this module on a file that is damaged or foreign.
DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError, RecursionError),
    *(ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, OSError, MemoryError),
)


class StateDict(dict):
    """A pickled OrderedDict; `metadata` is its `_metadata`, {} if there is none."""

    metadata: Mapping = {}

    def __setstate__(self, state):
        """Takes the metadata; no other attribute of the file's becomes one of ours."""
        metadata = state.get("_metadata") if isinstance(state, dict) else None
        self.metadata = metadata if isinstance(metadata, dict) else {}


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage that a pickle refers to."""

    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor that a pickle describes: a view of a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    strides: tuple[int, ...]


class _Callable:
    """Stands for a name in a pickle; has no attributes that the pickle could change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *args):
        return self._function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes a function of ours")


def _rebuild_tensor(storage, offset, size, strides, *_) -> _Tensor:
    """`torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor has no storage")
    return _Tensor(storage, int(offset), tuple(map(int, size)), tuple(map(int, strides)))


class _Unpickler(pickle.Unpickler):
    """Reads dicts, lists, text, numbers and descriptions of tensors."""

    def find_class(self, module: str, name: str):
        """Answers the names that state dicts consist of; UnpicklingError for any other."""
        if (module, name) == ("collections", "OrderedDict"):
            return _Callable(StateDict)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Callable(_rebuild_tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Callable(lambda tensor, *_: tensor)
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("argparse", "Namespace"):  # MAE's script saves its command line
            return type("Namespace", (), {"__setstate__": lambda self, state: None})
        name = name if module in ("builtins", "__builtin__") else f"{module}.{name}"
        raise pickle.UnpicklingError(
            f"it asks to run {name}, which was not done; only tensors are read"
        )

    def persistent_load(self, pid) -> _Storage:
        """("storage", type, key, device, elements), and None for no view in a legacy stream."""
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or view not in ([], [None]):
            raise pickle.UnpicklingError(
                "it holds views of storages, or something else than tensors"
            )
        return _Storage(dtype, str(key), int(count))


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], Mapping]:
    """Reads the state dict in a .pth file; an entry "model" or "state_dict" is unwrapped.

    Returns:
      ({name: array} with the file's number formats, the state dict's `_metadata` or {}).

    Raises:
      ValueError: the file is damaged, or holds something else than a flat dict of tensors; one line
        that begins with the path.
    """
    try:
        if zipfile.is_zipfile(path):
            content, storages = _read_zip(path)
        else:
            content, storages = _read_stream(path)
        for wrapper in WRAPPERS:
            if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
                content = content[wrapper]
        flat = isinstance(content, dict) and all(
            isinstance(k, str) and isinstance(v, _Tensor) for k, v in content.items()
        )
        state = {k: _array(v, storages) for k, v in content.items()} if flat else None
    except DAMAGE as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} is not a whole PyTorch weights file: {reason}") from e
    if state is None:
        raise ValueError(f"{path} holds no flat dict of tensors")
    return state, getattr(content, "metadata", {})


Storages = Callable[[_Storage], np.ndarray]


def _read_zip(path: pathlib.Path) -> tuple[object, Storages]:
    """The pickled object of a zip archive, and a reader of its storages."""
    content = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
            raise ValueError("its entries are compressed, which torch.save never does")
        pickles = [name for name in entries if name.count("/") <= 1 and name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive, but not one of torch.save")
        prefix = pickles[0].removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")
        tree = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()
        found = {
            name.removeprefix(f"{prefix}data/"): archive.read(name)
            for name in entries
            if name.startswith(f"{prefix}data/")
        }

    def storage(wanted: _Storage) -> np.ndarray:
        return np.frombuffer(found[wanted.key], wanted.dtype, wanted.count)

    return tree, storage


def _read_stream(path: pathlib.Path) -> tuple[object, Storages]:
    """The pickled object of a legacy stream, and a reader of its storages."""
    file = io.BytesIO(path.read_bytes())
    if _Unpickler(file).load() != MAGIC or _Unpickler(file).load() != PROTOCOL:
        raise ValueError("its content is neither a zip archive of tensors nor a stream of them")
    system = _Unpickler(file).load()
    if not system["little_endian"]:
        raise ValueError("its numbers are big-endian")
    tree = _Unpickler(file).load()
    starts, data = {}, file.getbuffer()
    itemsizes = {x.key: x.dtype.itemsize for x in _storages(tree)}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        starts[key] = file.tell()
        file.seek(count * itemsizes[key], io.SEEK_CUR)

    def storage(wanted: _Storage) -> np.ndarray:
        return np.frombuffer(data, wanted.dtype, wanted.count, starts[wanted.key])

    return tree, storage


def _storages(tree) -> list[_Storage]:
    """All storages under a tree of dicts, lists and tuples."""
    if isinstance(tree, _Tensor):
        return [tree.storage]
    branches = tree.values() if isinstance(tree, dict) else tree
    return (
        [x for branch in branches for x in _storages(branch)]
        if isinstance(tree, (dict, list, tuple))
        else []
    )


def _array(tensor: _Tensor, storages: Storages) -> np.ndarray:
    """The tensor's values; ValueError if the tensor reaches beyond its storage."""
    size, strides = tensor.size, tensor.strides
    if len(size) != len(strides) or min((*size, *strides, tensor.offset), default=0) < 0:
        raise ValueError("a tensor has impossible sizes")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
    count = math.prod(size)
    values = storages(tensor.storage)
    if count > len(values) or (count and last >= len(values)):
        raise ValueError("a tensor is larger than its storage")
    if not count:
        return np.zeros(size, values.dtype)
    steps = [step * values.itemsize for step in strides]
    view = np.lib.stride_tricks.as_strided(values[tensor.offset :], size, steps, writeable=False)
    return np.array(view, order="C")

"""PyTorch's files without torch: both formats are read, and nothing that they name is run."""

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from mmrjax.weights import source, torch_format

VALUES = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([0.5, 1.5], np.float16),
    "brain": np.array([1.5, -2], ml_dtypes.bfloat16),
    "steps": np.array(7, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}
NAMES = {dtype: name for name, dtype in torch_format.STORAGES.items()}


class Tensor:
    """A tensor in a pickle: `_rebuild_tensor_v2(storage, offset, size, strides, …)`."""

    def __init__(self, storage, offset, size, strides):
        self.args = storage, offset, size, strides, False, OrderedDict()


class Storage:
    """A storage in a pickle, by its persistent id."""

    def __init__(self, key, values, count=None):
        self.key, self.values = key, np.ravel(values)
        self.count = self.values.size if count is None else count


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            kind = getattr(sys.modules["torch"], NAMES[obj.values.dtype])
            return "storage", kind, obj.key, "cpu", obj.count
        return None

    def reducer_override(self, obj):
        if isinstance(obj, Tensor):
            return sys.modules["torch._utils"]._rebuild_tensor_v2, obj.args
        return NotImplemented


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Writes an object with tensors as torch.save does: write(object, zipped=…) -> path."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in torch_format.STORAGES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def rebuild():
        raise AssertionError

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)

    def pickled(obj) -> bytes:
        out = io.BytesIO()
        Pickler(out, 2).dump(obj)
        return out.getvalue()

    def write(obj, storages, zipped, compressed=False, order="little"):
        path = tmp_path / "x.pth"
        if zipped:
            kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            with zipfile.ZipFile(path, "w", kind) as archive:
                archive.writestr("x/data.pkl", pickled(obj))
                archive.writestr("x/byteorder", order)
                for x in storages:
                    archive.writestr(f"x/data/{x.key}", x.values.tobytes())
            return path
        system = {"protocol_version": 1001, "little_endian": order == "little", "type_sizes": {}}
        head = (torch_format.MAGIC, torch_format.PROTOCOL, system, obj, [x.key for x in storages])
        parts = [pickled(part) for part in head]
        parts += [struct.pack("<q", x.values.size) + x.values.tobytes() for x in storages]
        path.write_bytes(b"".join(parts))
        return path

    return write


def strides_of(array: np.ndarray) -> tuple[int, ...]:
    return tuple(step // array.itemsize for step in array.strides)


def tensors(values: dict) -> tuple[OrderedDict, list[Storage]]:
    storages = [Storage(str(i), x) for i, x in enumerate(values.values())]
    rows = zip(values.items(), storages, strict=True)
    return OrderedDict((k, Tensor(s, 0, x.shape, strides_of(x))) for (k, x), s in rows), storages


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["", "model", "state_dict"])
def test_both_formats_give_the_values_that_were_saved(write, zipped, wrapper):
    state, storages = tensors(VALUES)
    state._metadata = {"mmrjax": {"kind": "teacher"}}
    got, metadata = torch_format.read(
        write({wrapper: state} if wrapper else state, storages, zipped)
    )
    assert list(got) == list(VALUES)
    for name, want in VALUES.items():
        assert got[name].dtype == want.dtype
        np.testing.assert_array_equal(got[name], want)
    assert metadata == {"mmrjax": {"kind": "teacher"}}


@pytest.mark.parametrize("zipped", [True, False])
def test_views_of_one_storage_are_cut_out_of_it(write, zipped):
    base = np.arange(24, dtype=np.float32)
    storage = Storage("0", base)
    state = {"turned": Tensor(storage, 0, (4, 6), (1, 4)), "part": Tensor(storage, 8, (3,), (2,))}
    got, _ = torch_format.read(write(state, [storage], zipped))
    np.testing.assert_array_equal(got["turned"], base.reshape(6, 4).T)
    assert got["turned"].flags.c_contiguous
    np.testing.assert_array_equal(got["part"], base[8:14:2])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("offset", "size", "strides"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (1 << 40, 1), (0, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(write, zipped, offset, size, strides):
    storage = Storage("0", np.zeros(4, np.float32))
    path = write({"a": Tensor(storage, offset, size, strides)}, [storage], zipped)
    with pytest.raises(ValueError, match=r"is not a whole PyTorch weights file: a tensor"):
        torch_format.read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_storage_that_promises_more_than_the_file_holds_is_refused(write, zipped):
    storage = Storage("0", np.zeros(4, np.float32), count=1 << 50)
    path = write({"a": Tensor(storage, 0, (1 << 50,), (1,))}, [storage], zipped)
    with pytest.raises(ValueError, match="is not a whole PyTorch weights file"):
        torch_format.read(path)


class Call:
    """Asks to call a function while it is read."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "eval"),
        (getattr, "getattr"),
        (np.dtype, "numpy.dtype"),
        (pickle.loads, "_?pickle.loads"),
        (OrderedDict.fromkeys, "getattr"),
    ],
)
def test_a_name_outside_the_list_is_refused_by_name_and_not_run(
    write, tmp_path, zipped, function, name
):
    path = write({"a": Call(function, f"touch {tmp_path / 'trace'}")}, [], zipped)
    with pytest.raises(ValueError, match=f"asks to run {name}, which was not done") as caught:
        source.read(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_a_pickle_cannot_change_what_answers_its_names(write):
    """BUILD on an admitted name would set attributes on it."""
    code = b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    with pytest.raises(pickle.UnpicklingError, match="changes a function"):
        torch_format._Unpickler(io.BytesIO(code)).load()


@pytest.mark.parametrize("zipped", [True, False])
def test_big_endian_numbers_are_refused(write, zipped):
    with pytest.raises(ValueError, match="big-endian"):
        torch_format.read(write(*tensors(VALUES), zipped, order="big"))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(write):
    with pytest.raises(ValueError, match="its entries are compressed"):
        torch_format.read(write(*tensors(VALUES), True, compressed=True))


@pytest.mark.parametrize("zipped", [True, False])
def test_every_cut_of_a_file_is_noticed(write, zipped):
    path = write(*tensors({"a": np.arange(9, dtype=np.float32)}), zipped)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is not a whole PyTorch weights file"):
            torch_format.read(path)

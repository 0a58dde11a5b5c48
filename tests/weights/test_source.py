"""Where weights come from: checked, never unpickled, and a clear message without a network."""

import argparse
import hashlib
import importlib
import importlib.util
import os
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from mmrjax import weights
from mmrjax.runtime import files
from mmrjax.weights import source

STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2)}
CONTENT = b"weights" * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def published(content: bytes = CONTENT, known: bool = True, suffix: str = "npz"):
    prefix = hashlib.sha256(content).hexdigest()[:8] if known else ""
    return source.Published(f"https://example.org/models/net-1234.{suffix}", prefix, "none")


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert isinstance(got[key], np.ndarray)
        np.testing.assert_array_equal(got[key], value)


# --- published files


def test_without_the_variable_the_cache_lies_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MMRJAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "mmrjax"
    monkeypatch.setenv("MMRJAX_CACHE", "~/elsewhere")
    assert files.cache_dir() == tmp_path / "elsewhere"


def put(cache: pathlib.Path, content: bytes) -> pathlib.Path:
    path = cache / "weights" / "net-1234.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("known", [True, False])
def test_published_file_is_looked_up_in_the_cache(cache, known):
    path = put(cache, CONTENT)
    assert source.published_file(published(known=known)) == path
    assert source.sha256(path) == hashlib.sha256(CONTENT).hexdigest()


def test_absent_file_is_named_with_its_url_its_place_and_the_advice(cache):
    with pytest.raises(source.NotCached) as caught:
        source.published_file(published(), "; or draw it")
    path = cache / "weights" / "net-1234.npz"
    assert str(caught.value) == (
        "net-1234.npz is not in the cache and not fetched from https://example.org/models/"
        f"net-1234.npz; fetch it where there is a network and put it at {path}; or draw it"
    )
    assert not cache.exists()


def test_wrong_hash_is_refused_and_the_file_left_for_inspection(cache):
    path = put(cache, b"something else")
    given, wanted = hashlib.sha256(b"something else").hexdigest()[:8], published().sha256_prefix
    with pytest.raises(ValueError, match=rf"has sha256 {given}…, its publisher says {wanted}…"):
        source.published_file(published())
    assert path.read_bytes() == b"something else"


def test_published_hashes_are_those_in_torchvisions_file_names():
    assert source.IMAGENET["wide_resnet50_2"].sha256_prefix == "95faca4d"
    for entry in source.IMAGENET.values():
        assert entry.url.startswith("https://download.pytorch.org/models/")
        assert entry.filename.endswith(f"-{entry.sha256_prefix}.pth")
        assert len(entry.sha256_prefix) == 8
    assert source.MAE["base"].url == (
        "https://dl.fbaipublicfiles.com/mae/visualize/mae_visualize_vit_base.pth"
    )
    assert "NC" in source.MAE["base"].licence
    assert not source.MAE["base"].sha256_prefix  # none is published: none is invented


# --- reading


def test_safetensors_and_npz_are_read_as_they_were_written(tmp_path):
    safetensors.numpy.save_file(STATE, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **STATE)
    for name in ("x.safetensors", "x.npz"):
        assert_equal(source.read(tmp_path / name)[0], STATE)
    assert_equal(source.read(str(tmp_path / "x.npz"))[0], STATE)


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pth"])
def test_missing_file_is_named(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match=rf"no weights file at .*none\.{suffix}"):
        source.read(tmp_path / f"none.{suffix}")


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".txt", ""])
def test_unknown_suffix_lists_the_known(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"?")
    with pytest.raises(ValueError, match=r"unknown suffix; known are \.safetensors, \.npz, \.pth"):
        source.read(path)


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    path.write_bytes(b"<html>404 not found</html>" * 10)


def truncated(path):
    if path.suffix == ".npz":
        np.savez(path, **STATE)
    else:
        safetensors.numpy.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-20])


def single_array(path):
    with path.open("wb") as f:
        np.save(f, np.ones(3))


def damaged_archive(path):
    np.savez_compressed(path, a=np.arange(1000))
    data = bytearray(path.read_bytes())
    data[61] ^= 0x55  # inside the compressed data: zlib notices before the checksum does
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        *(("npz", write) for write in (empty, foreign, truncated, single_array, damaged_archive)),
        *(("safetensors", write) for write in (empty, foreign, truncated)),
    ],
)
def test_damaged_and_foreign_files_are_named(tmp_path, suffix, write):
    path = tmp_path / f"x.{suffix}"
    write(path)
    with pytest.raises(ValueError, match=rf"x\.{suffix} is not a whole \.{suffix} file"):
        source.read(path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, trace: pathlib.Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_npz_with_pickled_objects_is_refused_without_unpickling(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([Bomb(tmp_path / "trace")], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        source.read(tmp_path / "x.npz")
    assert not (tmp_path / "trace").exists()


# --- PyTorch files


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the torch extra is not installed")


@pytest.mark.torch
@pytest.mark.parametrize("wrappers", [(), ("model",), ("state_dict",), ("model", "state_dict")])
@pytest.mark.parametrize("suffix", ["pth", "pt"])
def test_pytorch_state_dicts_are_read_and_unwrapped(tmp_path, torch, wrappers, suffix):
    state = {key: torch.tensor(value) for key, value in STATE.items()}
    for wrapper in reversed(wrappers):
        state = {wrapper: state, "epoch": 7}
    torch.save(state, tmp_path / f"x.{suffix}")
    assert_equal(source.read(tmp_path / f"x.{suffix}")[0], STATE)


@pytest.mark.torch
def test_pytorch_dtypes_become_float32_or_stay_integers(tmp_path, torch):
    state = {
        "half": torch.full((2,), 0.5, dtype=torch.float16),
        "brain": torch.full((2,), 1.5, dtype=torch.bfloat16),
        "count": torch.tensor(3),
    }
    torch.save(state, tmp_path / "x.pth")
    got = source.read(tmp_path / "x.pth")[0]
    assert {k: (v.dtype.name, v.max()) for k, v in got.items()} == {
        "half": ("float32", 0.5),
        "brain": ("float32", 1.5),
        "count": ("int64", 3),
    }


@pytest.mark.torch
def test_bfloat16_in_safetensors_becomes_float32(tmp_path, torch):
    tensors = {"a": torch.full((2,), 1.5, dtype=torch.bfloat16)}
    importlib.import_module("safetensors.torch").save_file(tensors, tmp_path / "x.safetensors")
    got = source.read(tmp_path / "x.safetensors")[0]
    assert_equal(got, {"a": np.full(2, 1.5, np.float32)})
    assert got["a"].dtype == np.float32


@pytest.mark.torch
def test_number_format_without_a_counterpart_is_named(tmp_path, torch):
    tensors = {"a": torch.ones(2).to(torch.float8_e4m3fn)}
    importlib.import_module("safetensors.torch").save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors is not .*float8_e4m3fn"):
        source.read(tmp_path / "x.safetensors")


@pytest.mark.torch
def test_trained_tensors_and_a_command_line_beside_them_are_read(tmp_path, torch):
    """As MAE's training script saves them; the command line is inert and ignored."""
    state = {"a": torch.nn.Parameter(torch.ones(2))}
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "x.pth")
    assert_equal(source.read(tmp_path / "x.pth")[0], {"a": np.ones(2)})


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["sparse", "meta", "numbered"])
def test_tensors_without_plain_values_are_refused(tmp_path, torch, kind):
    tensor = torch.ones(2).to_sparse() if kind == "sparse" else torch.ones(2)
    tensor = tensor.to("meta") if kind == "meta" else tensor
    torch.save({3 if kind == "numbered" else "a": tensor}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"holds no flat dict of|asks to run torch\._utils"):
        source.read(tmp_path / "x.pth")


@pytest.mark.torch
@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", b"\x80\x04N."])
def test_foreign_pytorch_files_get_one_line_without_advice(tmp_path, torch, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"x\.pth (is not a whole PyTorch|holds no flat)"
    ) as caught:
        source.read(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.mark.torch
@pytest.mark.parametrize("function", [os.mkdir, print])
def test_what_a_hostile_file_asks_to_run_is_named(tmp_path, torch, function):
    class Call:
        def __reduce__(self):
            return function, (str(tmp_path / "trace"),)

    torch.save({"a": Call()}, tmp_path / "x.pth")
    name = "posix.mkdir" if function is os.mkdir else "print"
    with pytest.raises(ValueError, match=f"asks to run {name}, which was not done") as caught:
        source.read(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.torch
def test_truncated_pytorch_file_is_named(tmp_path, torch):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"x\.pth is not a whole PyTorch weights file"):
        source.read(path)


@pytest.mark.torch
@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"layer": {"weight": 1.0}}])
def test_pytorch_file_of_something_else_is_refused(tmp_path, torch, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no flat dict of tensors"):
        source.read(tmp_path / "x.pth")


# --- buckets


@pytest.fixture
def bucket(monkeypatch):
    """gs:// is a file system in memory; returns it."""
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem()
    backend = type(importlib.import_module("etils.epath.backend").fsspec_backend)
    monkeypatch.setattr(backend, "fs", lambda self, path: memory)
    yield memory
    memory.store.clear()


def test_weights_in_a_bucket_are_copied_once_into_the_cache(cache, bucket):
    address = "gs://shop/teachers/mine.safetensors"
    with bucket.open(address, "wb") as file:
        file.write(CONTENT)
    path = source.remote_file(address)
    assert path.read_bytes() == CONTENT
    assert path.name == "mine.safetensors"
    assert cache in path.parents
    bucket.store.clear()
    assert source.remote_file(address) == path
    assert source.remote_file(address).read_bytes() == CONTENT


def test_an_address_without_a_file_is_named_with_its_field(cache, bucket):
    with pytest.raises(FileNotFoundError, match=r"teacher.weights='gs://shop/no.npz': it cannot"):
        weights.teacher_file("resnet18", "gs://shop/no.npz")
    assert not cache.exists()


def test_a_bucket_without_its_package_says_what_to_install(cache, monkeypatch):
    def read(self):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(source.epath.Path("gs://shop/x.npz")), "read_bytes", read)
    with pytest.raises(ValueError, match=r"student.init=.*gcsfs.*pip install 'mmrjax\[gcs\]'"):
        weights.student_file("gs://shop/x.npz", "base")
    with pytest.raises(ValueError, match=r"expected a file here or a gs:// address"):
        weights.student_file("ftp://shop/x.npz", "base")

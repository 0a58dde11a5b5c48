"""Our weights files: what is written is what is read, by name, value and fact."""

import collections
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mmrjax.weights import source, storage

FACTS = {"kind": "student", "arch": "base", "licence": "none"}
TREE = {"params": {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T}}}


def test_names_values_and_facts_are_kept(tmp_path):
    tree = {**TREE, "positions": {"table": jnp.ones((2, 2))}}
    storage.write(tmp_path / "new" / "x.safetensors", tree, FACTS)
    plain = safetensors.numpy.load_file(tmp_path / "new" / "x.safetensors")
    assert plain.keys() == {"params/a/kernel", "positions/table"}
    variables, facts = storage.read(tmp_path / "new" / "x.safetensors")
    np.testing.assert_array_equal(variables["params"]["a"]["kernel"], TREE["params"]["a"]["kernel"])
    assert facts == {**FACTS, "format": "mmrjax"}
    assert storage.is_ours(tmp_path / "new" / "x.safetensors")


def test_files_of_others_are_not_ours(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"1234")
    for name in ("x.safetensors", "short.safetensors", "none.safetensors", "x.npz"):
        assert not storage.is_ours(tmp_path / name)
    with pytest.raises(ValueError, match="not a weights file of mmrjax"):
        storage.read(tmp_path / "x.safetensors")
    state, header = storage.read_any(tmp_path / "x.safetensors")
    assert (state.keys(), header) == ({"a"}, {})


def test_unknown_kind_of_content_is_refused(tmp_path):
    storage.write(tmp_path / "x.safetensors", TREE, {"kind": "memory bank"})
    with pytest.raises(ValueError, match="not a weights file of mmrjax"):
        storage.read_any(tmp_path / "x.safetensors")


@pytest.mark.torch
@pytest.mark.parametrize("wrapper", ["", "model"])
def test_pth_files_hold_tensors_and_facts_that_pytorch_does_not_see(tmp_path, wrapper):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    model = torch.nn.BatchNorm2d(3)  # whose state dict depends on the version in its metadata
    names = ("weight", "bias", "running_mean", "running_var")
    values = {name: np.arange(3, dtype=np.float32) + i for i, name in enumerate(names)}
    values["weight"].setflags(write=False)  # as arrays from a device are
    storage.write_torch(tmp_path / "x.pth", values, FACTS, wrapper)
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    content = content[wrapper] if wrapper else content
    assert list(content) == list(names)
    model.load_state_dict(content, strict=True)
    np.testing.assert_array_equal(model.running_var, values["running_var"])
    state, facts = source.read(tmp_path / "x.pth")
    np.testing.assert_array_equal(state["weight"], values["weight"])
    assert facts == FACTS
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.torch
@pytest.mark.parametrize(
    "metadata", ["text", {"": {"version": 1}}, {"mmrjax": "x"}, {"mmrjax": {"random": 1, 2: "x"}}]
)
def test_what_others_keep_beside_their_tensors_is_no_fact(tmp_path, metadata):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    state = collections.OrderedDict(a=torch.ones(2))
    state._metadata = metadata
    torch.save(state, tmp_path / "x.pth")
    state, facts = source.read(tmp_path / "x.pth")
    assert (state.keys(), facts) == ({"a"}, {})


def test_without_torch_a_pth_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pip install torch, or write"):
        storage.write_torch(tmp_path / "x.pth", {"a": np.ones(2)}, FACTS)
    assert not list(tmp_path.iterdir())

"""Frozen ViTs under the names of their authors and of timm, and the published files."""

import dataclasses
import hashlib
import json

import formula
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mmrjax import convert, weights
from mmrjax.models import backbones, vit_backbone
from mmrjax.weights import source, storage, teachers, vit_names, vit_sources

PLAIN = vit_backbone.Architecture(32, 2, 2, 4, (1, 2), 3)
FAMILIES = {
    "plain": {},
    "dinov2": {"scaled": True, "masked": True, "positions": "offset"},
    "dinov2 with registers": {"scaled": True, "masked": True, "registers": 4},
    "dinov2 with swiglu": {"scaled": True, "masked": True, "swiglu": True, "hidden": 24},
    "dinov3": {"table": 0, "scaled": True, "masked": True, "registers": 4},
    "dinov3 plus": {"table": 0, "scaled": True, "registers": 4, "swiglu": True, "hidden": 24},
}


def arch_of(family: str) -> vit_backbone.Architecture:
    return dataclasses.replace(PLAIN, **FAMILIES[family])


def filled(arch) -> dict:
    """A state dict in which every tensor has values of its own."""
    shapes = {
        key: value.shape for key, value in vit_names._views(vit_names._hollow(arch), arch).items()
    }
    state = {key: formula.formula_weights(key, shape) for key, shape in shapes.items()}
    for key in state:
        if key.endswith("bias_mask"):
            state[key] = np.repeat(np.float32([1, 0, 1]), arch.width)
        elif key.endswith("qkv.bias") and not arch.table:
            state[key][arch.width : 2 * arch.width] = 0
    return state


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.view("i4"), y.view("i4")), a, b)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_state_dicts_come_and_leave_bit_for_bit(family):
    arch = arch_of(family)
    state = filled(arch)
    variables = teachers.from_torch(state, arch)
    left = teachers.to_torch(variables, arch)
    assert left.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(left[key].view("i4"), value.view("i4"), err_msg=key)
    assert_same_bits(teachers.from_torch(left, arch), variables)


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_keys_and_shapes_are_those_of_the_published_files(golden_dir, size):
    keys = json.loads((golden_dir / "dinov2" / f"keys_vit_{size}14_reg4.json").read_text())
    arch = backbones.architecture(f"dinov2_vit{size[0]}14_reg4")
    like = vit_names._views(vit_names._hollow(arch), arch)
    assert {key: list(value.shape) for key, value in like.items()} == keys


def test_keys_of_dino_and_timm_s_vit_are_those_of_the_files(shared):
    path = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    state = source.read(path)[0]
    arch = backbones.architecture("vit_tiny_patch16_224")
    left = teachers.to_torch(teachers.from_torch(state, arch), arch)
    assert left.keys() == state.keys() - {"head.weight", "head.bias"}
    for key, value in left.items():
        np.testing.assert_array_equal(value, state[key])


def test_timm_s_dinov2_with_registers_is_the_official_one():
    arch = arch_of("dinov2 with registers")
    official = filled(arch)
    state = dict(official)
    del state["mask_token"]
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    images = np.random.default_rng(0).normal(size=(1, 8, 16, 3)).astype(np.float32)
    module = arch.module((1, 2), np.float32, "")
    a, b = (module.apply(teachers.from_torch(x, arch), images) for x in (official, state))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)


def test_timm_s_names_of_swiglu_are_the_official_ones():
    arch = arch_of("dinov2 with swiglu")
    official = filled(arch)
    renamed = {".mlp.w12.": ".mlp.fc1.", ".mlp.w3.": ".mlp.fc2."}
    state = {}
    for key, value in official.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        state[key] = value
    assert state.keys() != official.keys()
    assert_same_bits(teachers.from_torch(state, arch), teachers.from_torch(official, arch))


def test_timm_s_names_of_dinov3_are_the_official_ones():
    arch = arch_of("dinov3 plus")
    official = filled(arch)
    official["rope_embed.periods"] = np.asarray(vit_backbone.rotary_periods(4))
    state = {"head.weight": np.zeros((2, 32), np.float32)}
    renamed = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    renamed |= {"mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2."}
    for key, value in official.items():
        if key.endswith("qkv.bias"):
            q, _, v = np.split(value, 3)
            block = key.removesuffix("qkv.bias")
            state |= {f"{block}q_bias": q, f"{block}v_bias": v}
        elif not key.endswith(("bias_mask", "periods", "mask_token")):
            for old, new in renamed.items():
                key = key.replace(old, new)
            state[key] = value
    assert_same_bits(teachers.from_torch(state, arch), teachers.from_torch(official, arch))


def test_the_bias_of_dinov3_s_keys_is_masked():
    """The official code multiplies it by bias_mask; before that it may be anything."""
    arch = arch_of("dinov3")
    state = filled(arch)
    for key in state:
        if key.endswith("qkv.bias"):
            state[key] = state[key] + np.repeat(np.float32([0, 9, 0]), arch.width)
    assert_same_bits(teachers.from_torch(state, arch), teachers.from_torch(filled(arch), arch))


def test_blocks_in_chunks_are_numbered_through():
    arch = arch_of("dinov2")
    official = filled(arch)
    state = {
        key.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): value
        for key, value in official.items()
    }
    assert "blocks.1.1.norm1.bias" in state
    assert_same_bits(teachers.from_torch(state, arch), teachers.from_torch(official, arch))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_files_in_half_precision_load(tmp_path, dtype):
    arch = arch_of("dinov2")
    half = {key: value.astype(dtype) for key, value in filled(arch).items()}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    variables = teachers.from_torch(source.read(tmp_path / "half.safetensors")[0], arch)
    want = {key: value.astype(np.float32) for key, value in half.items()}
    assert_same_bits(variables, teachers.from_torch(want, arch))


@pytest.mark.parametrize(
    ("family", "other", "named"),
    [
        ("dinov2", "dinov2 with registers", "1 tensors missing: register_tokens"),
        ("dinov2 with registers", "dinov2", "1 tensors unexpected: register_tokens"),
        ("plain", "dinov2", r"4 tensors missing: blocks\.0\.ls1\.gamma"),
        ("dinov2", "dinov3", r"missing: .*storage_tokens"),
        ("dinov3 plus", "dinov3", r"missing: .*mlp\.fc1"),
    ],
)
def test_a_file_of_another_vit_is_refused_with_names(family, other, named):
    with pytest.raises(ValueError, match=rf"another architecture: .*{named}"):
        teachers.from_torch(filled(arch_of(family)), arch_of(other))


def test_a_file_of_another_size_is_refused_with_both_shapes():
    wide = dataclasses.replace(PLAIN, table=4)
    with pytest.raises(ValueError, match=r"pos_embed: given \(1, 10, 32\) expected \(1, 17, 32\)"):
        teachers.from_torch(filled(PLAIN), wide)


@pytest.mark.parametrize("family", ["plain", "dinov2 with registers", "dinov3"])
def test_random_weights_follow_from_the_seed(family):
    arch = arch_of(family)
    drawn = teachers.random(arch, 1)
    assert_same_bits(drawn, teachers.random(arch, 1))
    assert not np.array_equal(
        drawn["params"]["patch"]["kernel"], teachers.random(arch, 2)["params"]["patch"]["kernel"]
    )
    assert drawn["params"]["block_0"]["qkv"]["kernel"].std() == pytest.approx(0.02, rel=0.1)
    assert (drawn["params"]["block_1"]["norm1"]["scale"] == 1).all()


def test_a_vit_is_converted_and_converted_back(tmp_path):
    arch = backbones.architecture("deit_tiny_patch16_224")
    state = filled(arch) | {"head.weight": np.zeros((10, 192), np.float32)}
    given, ours, left = (tmp_path / f"{n}.safetensors" for n in ("given", "ours", "left"))
    safetensors.numpy.save_file(state, given)
    lines = convert.from_torch("teacher", "deit_tiny_patch16_224", given, ours)
    assert lines[2] == "unused  1: head.weight"
    convert.to_torch("teacher", "", ours, left)
    again = source.read(left)[0]
    assert again.keys() == state.keys() - {"head.weight"}
    for key, value in again.items():
        np.testing.assert_array_equal(value, state[key])
    _, variables, facts = weights.load_teacher("deit_tiny_patch16_224", str(ours))
    assert facts["converted_from"]["source"] == "given.safetensors"
    assert_same_bits(variables, storage.read(ours)[0])


# --- published files


def test_every_vit_has_a_published_file_under_a_name_of_its_own():
    assert vit_sources.PUBLISHED.keys() == vit_backbone.ARCHITECTURES.keys()
    names = [published.filename for published in vit_sources.PUBLISHED.values()]
    assert len({*names}) == len(names)
    for name, published in vit_sources.PUBLISHED.items():
        assert published.url.startswith("https://")
        assert all(c in "0123456789abcdef" for c in published.sha256_prefix), name
        assert bool(published.sha256_prefix) == name.startswith(("deit", "dinov3")), name
        assert ("forbids" in published.licence) == name.startswith("dinov3"), name


def test_an_absent_published_file_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path))
    with pytest.raises(
        source.NotCached, match=r"dinov3_vits16_pretrain.*accept the DINOv3 License"
    ):
        weights.teacher_file("dinov3_vits16", "published")
    with pytest.raises(source.NotCached, match="dinov2_vits14_reg4_pretrain") as absent:
        weights.teacher_file("dinov2_vits14_reg4", "published")
    assert absent.value.url == (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    )


def test_the_licence_is_the_publishers_only_if_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path))
    arch = backbones.architecture("vit_tiny_patch16_224")
    folder = tmp_path / "weights"
    folder.mkdir()
    path = folder / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    safetensors.numpy.save_file(filled(arch), path)
    _, _, facts = weights.load_teacher("vit_tiny_patch16_224", "published")
    assert facts["licence"] == "Apache-2.0"
    _, _, facts = weights.load_teacher("vit_tiny_patch16_224", str(path))
    assert facts["licence"] == source.LOCAL
    digest = hashlib.sha256(b"").hexdigest()
    assert vit_sources.licence("dinov3_vits16", "a file", "08c60483" + digest[8:]) == (
        vit_sources.DINO3_LICENCE
    )
    assert vit_sources.licence("dinov3_vits16", "a file", digest) == source.LOCAL

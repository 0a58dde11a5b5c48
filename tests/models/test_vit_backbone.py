"""Frozen ViTs against the official DINOv2, timm, and real weights; sizes, taps and tables."""

import dataclasses
import json

import cv2
import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import weights
from mmrjax.models import attention, backbones, positions, vit_backbone
from mmrjax.weights import source, vit_names

SMALL = vit_backbone.Architecture(
    48, 4, 3, 14, (1, 2, 3, 4), 5, scaled=True, masked=True, normed=False
)
TAGS = {
    "reg0_off01": {"positions": "offset"},
    "reg4_aa": {"registers": 4},
    "reg4_off01": {"registers": 4, "positions": "offset"},
}
SIZES = ((70, 70), (84, 84), (98, 56))


def golden_state(golden_dir, arch) -> dict:
    keys = json.loads((golden_dir / "dinov2" / "keys.json").read_text())
    if arch.swiglu:
        for i in range(arch.depth):
            for part in ("weight", "bias"):
                for old, new, first in (("fc1", "w12", 2 * arch.hidden), ("fc2", "w3", 48)):
                    del keys[f"dino.blocks.{i}.mlp.{old}.{part}"]
                    inner = 48 if new == "w12" else arch.hidden
                    shape = (first, inner) if part == "weight" else (first,)
                    keys[f"dino.blocks.{i}.mlp.{new}.{part}"] = shape
    state = {
        key.removeprefix("dino."): formula.formula_weights(key, shape)
        for key, shape in keys.items()
    }
    if not arch.registers:
        del state["register_tokens"]
    return state


def golden_images(size) -> jnp.ndarray:
    h, w = size
    x = formula.formula_image(f"dino.x{h}x{w}", (2 if size == (70, 70) else 1, 3, h, w))
    return jnp.asarray(4 * (x - 0.5).transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def golden(golden_dir):
    """(outputs of the official code, {name: tolerance})."""
    folder = golden_dir / "dinov2"
    errors = json.loads((folder / "errors.json").read_text())
    return dict(np.load(folder / "outputs.npz")), {k: v.get("atol", 0) for k, v in errors.items()}


def run(golden_dir, arch, images, masked=None):
    """{block: all tokens}."""
    module = vit_backbone.ViT(arch, tuple(range(arch.depth + 1)))
    apply = jax.jit(lambda v, x: module.apply(v, x, masked, method="tokens"))
    return apply(vit_names.from_torch(golden_state(golden_dir, arch), arch), images)


# --- DINOv2


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("tag", sorted(TAGS))
def test_tokens_of_every_block_equal_the_official_code(golden_dir, golden, agree, tag, size):
    outputs, atol = golden
    arch = dataclasses.replace(SMALL, **TAGS[tag])
    tokens = run(golden_dir, arch, golden_images(size))
    normed = run(golden_dir, dataclasses.replace(arch, normed=True), golden_images(size))
    name, r = f"{tag}__{size[0]}x{size[1]}__", arch.registers
    found = {f"{name}block{i}": tokens[i + 1] for i in range(4)}
    found |= {f"{name}tokens": tokens[0]}
    found |= {f"{name}norm_cls": normed[4][:, 0], f"{name}norm_reg": normed[4][:, 1 : 1 + r]}
    found |= {f"{name}norm_patch": normed[4][:, 1 + r :]}
    found |= {f"{name}get_intermediate_last2_cls": normed[3][:, 0]}
    compared = found.keys() & outputs.keys()
    assert len(compared) >= 3 or (tag, size) == ("reg4_off01", (70, 70)) or "84" in name
    for key in compared:
        agree(key, found[key], outputs[key], atol[key])


@pytest.mark.parametrize("tag", ["reg0_off01", "reg4_aa"])
def test_a_tap_is_the_normed_map_of_get_intermediate_layers(golden_dir, golden, agree, tag):
    outputs, atol = golden
    arch = dataclasses.replace(SMALL, normed=True, **TAGS[tag])
    state = golden_state(golden_dir, arch)
    module = vit_backbone.ViT(arch, (3,))
    got = jax.jit(module.apply)(vit_names.from_torch(state, arch), golden_images((84, 84)))
    key = f"{tag}__84x84__get_intermediate_last2_first"
    agree(key, got, {3: outputs[key].transpose(0, 2, 3, 1)}, atol[key])


def test_swiglu_equals_the_official_code(golden_dir, golden, agree):
    outputs, atol = golden
    hidden = int(outputs["swiglu_hidden"][0])
    facts = {"swiglu": True, "hidden": hidden, "normed": True}
    arch = dataclasses.replace(SMALL, **facts)
    got = run(golden_dir, arch, golden_images((70, 70)))[4][:, 1:]
    agree("swiglu", got, outputs["swiglu__norm_patch"], atol["swiglu__norm_patch"])


def test_masked_patches_are_the_mask_token_before_positions(golden_dir, golden, agree):
    outputs, atol = golden
    arch = dataclasses.replace(SMALL, registers=4, normed=True)
    masked = jnp.broadcast_to(jnp.arange(25) % 3 == 0, (2, 25))
    got = run(golden_dir, arch, golden_images((70, 70)), masked)[4][:, 5:]
    key = "reg4_aa__masked_norm_patch"
    agree(key, got, outputs[key], atol[key])


@pytest.mark.parametrize(("tag", "mode"), [("aa", "antialias"), ("off01", "offset")])
@pytest.mark.parametrize("size", [(224, 224), (392, 392), (448, 448), (224, 336)], ids=str)
def test_the_table_of_518_px_comes_to_other_sizes_as_official(golden, agree, tag, mode, size):
    outputs, _ = golden
    key = f"pos518_{tag}__{size[0]}x{size[1]}"
    table = formula.formula_weights("dino.pos_embed", (1, 1 + 37 * 37, 48))[0]
    grid = size[0] // 14, size[1] // 14
    got = np.concatenate([table[:1], positions.resized(jnp.asarray(table[1:]), 37, grid, mode)])
    agree(key, got[::5, ::4], outputs[key], 5e-6)  # torch computes places in float32


@pytest.mark.parametrize("mode", positions.TABLE_MODES)
def test_a_table_of_the_same_grid_stays_bit_for_bit(mode):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)
    assert positions.resized(table, 3, (3, 3), mode) is table
    # As many cells in another shape are interpolated all the same.
    wide = positions.resized(jnp.tile(table, (4, 1)), 6, (4, 9), mode)
    assert wide.shape == (36, 4)


def test_registers_and_class_token_take_no_part_in_the_patches_positions(golden_dir):
    arch = dataclasses.replace(SMALL, registers=4)
    state = golden_state(golden_dir, arch)
    other = state | {"pos_embed": state["pos_embed"] + (np.arange(26) > 0)[:, None]}
    module, images = vit_backbone.ViT(arch, (0,)), golden_images((84, 84))
    a, b = (
        module.apply(vit_names.from_torch(x, arch), images, method="tokens")[0]
        for x in (state, other)
    )
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    np.testing.assert_allclose(b[:, 5:] - a[:, 5:], 1, atol=1e-5)


# --- timm


def timm_model(name, **facts):
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=0, **facts).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(torch.from_numpy(formula.formula_weights(key, tuple(value.shape))))
    return torch, model


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "ours", "changes"),
    [
        ("vit_tiny_patch16_224", "vit_tiny_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", "dinov2_vits14_reg4", {}),
        ("vit_small_patch14_dinov2", "dinov2_vits14", {"positions": "antialias"}),
        ("vit_small_patch16_dinov3", "dinov3_vits16", {}),
        ("vit_small_patch16_dinov3_qkvb", "dinov3_vits16", {}),
        ("vit_small_plus_patch16_dinov3", "dinov3_vits16plus", {}),
    ],
)
def test_features_equal_timm_at_random_weights(agree, name, ours, changes):
    torch, model = timm_model(name, depth=3, dynamic_img_size=True)
    arch = dataclasses.replace(backbones.architecture(ours), depth=3, taps=(1, 2, 3), **changes)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    variables = vit_names.from_torch(state, arch)
    h, w = 6 * arch.patch, 5 * arch.patch
    images = np.random.default_rng(0).normal(size=(2, 3, h, w)).astype(np.float32)
    with torch.no_grad():
        found = model.forward_intermediates(
            torch.from_numpy(images), indices=[0, 2], norm=True, intermediates_only=True
        )
    want = {n: x.numpy().transpose(0, 2, 3, 1) for n, x in zip((1, 3), found, strict=True)}
    got = arch.module((1, 3), jnp.float32, "").apply(
        variables, jnp.asarray(images.transpose(0, 2, 3, 1))
    )
    agree(f"timm's {name}", got, want, 2e-5)


# --- all architectures


@pytest.mark.parametrize("name", sorted(vit_backbone.ARCHITECTURES))
def test_every_architecture_gives_maps_of_its_patches(name):
    backbone = backbones.build(name)
    h, w = 3 * backbone.arch.patch, 2 * backbone.arch.patch
    variables = vit_names._hollow(backbone.arch)
    shapes = jax.eval_shape(backbone.apply, variables, jnp.zeros((2, h, w, 3)))
    assert {x.shape for x in shapes.values()} == {(2, 3, 2, backbone.arch.width)}
    assert len(shapes) == 3


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("dinov2_vits14", 22_056_576),
        ("dinov2_vits14_reg4", 22_058_112),
        ("dinov2_vitb14_reg4", 86_583_552),
        ("dinov2_vitl14_reg4", 304_372_736),
        ("dinov2_vitg14", 1_136_480_768),
    ],
)
def test_parameter_counts_are_the_published_ones(name, count):
    leaves = jax.tree.leaves(vit_names._hollow(backbones.architecture(name)))
    assert sum(leaf.size for leaf in leaves) == count


def test_images_of_other_sizes_are_refused_before_work_begins():
    backbone = backbones.build("dinov2_vits14")
    backbone.check_size((224, 238))
    with pytest.raises(
        ValueError, match=r"multiples of 14 px, not 256 x 224: .*image_size=252,224"
    ):
        backbone.check_size((256, 224))
    with pytest.raises(ValueError, match="multiples of 14"):
        jax.eval_shape(backbone.module.init, jax.random.key(0), jnp.zeros((1, 224, 225, 3)))


def test_blocks_and_fields_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="after blocks 1 to 12, not 13"):
        backbones.build("vit_tiny_patch16_224", taps=(13,))
    with pytest.raises(ValueError, match=r"teacher\.positions='cubic': known are offset"):
        backbones.build("vit_tiny_patch16_224", changes={"positions": "cubic"})
    with pytest.raises(ValueError, match=r"teacher\.normed: for ViTs alone, and teacher resnet18"):
        backbones.build("resnet18", changes={"normed": False})


def test_nothing_after_the_last_tap_is_computed():
    arch = backbones.architecture("vit_tiny_patch16_224")
    shapes = jax.eval_shape(
        arch.module((2,), jnp.float32, "").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
    )
    assert {name for name in shapes["params"] if "block" in name} == {"block_0", "block_1"}


@pytest.mark.parametrize("n", [7, 64])
def test_attention_by_rows_is_attention(monkeypatch, n):
    monkeypatch.setattr(attention, "LOGITS_AT_A_TIME", 3 * n * 5)  # rows in parts of five
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, n, 3, 8))
    got = attention.attention_by_rows(q, k, v)
    np.testing.assert_allclose(got, attention.softmax_attention(q, k, v), atol=1e-6)


def test_memory_of_attention_does_not_grow_with_the_square_of_the_patches():
    """At 448 px with patches of 8 px, all logits of a ViT-S would take 226 MiB an image."""
    z = jax.ShapeDtypeStruct((1, 56 * 56 + 1, 6, 64), jnp.float32)
    compiled = jax.jit(attention.attention_by_rows).lower(z, z, z).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 60 << 20


def test_bfloat16_is_near_float32():
    arch = dataclasses.replace(backbones.architecture("dinov3_vits16"), depth=2, taps=(2,))
    variables = vit_names.random(arch, 0)
    images = jax.random.normal(jax.random.key(0), (1, 48, 64, 3))
    want = arch.module((2,), jnp.float32, "").apply(variables, images)[2]
    got = arch.module((2,), jnp.bfloat16, "").apply(variables, images)[2]
    assert got.dtype == jnp.bfloat16
    assert jnp.abs(got.astype(jnp.float32) - want).max() < 0.1


# --- real weights


def test_the_real_vit_tiny_sees(shared):
    """Its class token, read by its own head, names two photographs."""
    datasets = pytest.importorskip("sklearn.datasets")
    path = shared / "weights" / "vit_tiny_patch16_224.safetensors"
    backbone, variables, _ = weights.load_teacher("vit_tiny_patch16_224", str(path))
    state = source.read(path)[0]
    module = backbone.arch.module((12,), jnp.float32, "")
    classes = []
    for name in ("china.jpg", "flower.jpg"):
        image = datasets.load_sample_image(name)
        h, w = image.shape[:2]
        image = image[:, (w - h) // 2 :][:, :h]
        image = cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA)
        images = backbone.normalise(jnp.asarray(image, jnp.float32)[None] / 255)
        token = module.apply(variables, images, method="tokens")[12][0, 0]
        logits = state["head.weight"] @ np.asarray(token) + state["head.bias"]
        classes.append(np.argsort(-logits)[:3].tolist())
    assert 698 in classes[0]  # palace
    assert classes[1][0] == 985  # daisy

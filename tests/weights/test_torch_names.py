"""Names and layouts: nothing is lost or mixed up between PyTorch's state dicts and ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import positions, resnet
from mmrjax.weights import resnet_names, source, teachers, torch_names

STATES = ("state_img64", "state_img64_sincos", "state_img64_lowvar")


@pytest.fixture(scope="module")
def read(golden_dir):
    """Reads one of the official student states."""
    return lambda name: source.read(golden_dir / "student" / f"{name}.safetensors")[0]


@pytest.fixture(scope="module")
def student(read):
    """(official state, the same as mmrjax variables)."""
    state = read("state_img64")
    return state, torch_names.student_from_torch(state)


def is_of_layer(key: str, layers: tuple[int, ...]) -> bool:
    return not key.startswith("simfp_") or int(key[6]) - 1 in layers


# --- student


@pytest.mark.parametrize("name", STATES)
def test_student_state_survives_the_round_trip_bit_for_bit(read, name):
    state = read(name)
    again = torch_names.student_to_torch(torch_names.student_from_torch(state))
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert again[key].dtype == value.dtype
        assert again[key].flags.c_contiguous, key  # safetensors writes the buffer as it lies
        np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_keys_and_shapes_are_the_official_ones(student, golden_dir):
    official = json.loads((golden_dir / "student/keys.json").read_text())
    official["decoder_FPN_pos_embed"] = [1, 17, 48]  # the list is of 224 px, this state of 64 px
    state = torch_names.student_to_torch(student[1])
    assert {key: list(value.shape) for key, value in state.items()} == official


def test_variables_survive_the_round_trip_the_other_way(student):
    variables = student[1]
    again = torch_names.student_from_torch(torch_names.student_to_torch(variables))
    jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("layers", [(1,), (2,), (3,), (1, 3), (2, 3)])
def test_student_of_some_layers_has_only_their_pyramid(student, layers):
    state, variables = student
    part = torch_names.student_from_torch(state, layers)
    stages = {name.split("_")[0] for name in part["params"]["fpn"]}
    assert stages == {f"layer{layer}" for layer in layers}
    again = torch_names.student_to_torch(part)
    assert again.keys() == {key for key in state if is_of_layer(key, layers)}
    np.testing.assert_array_equal(part["params"]["mask_token"], variables["params"]["mask_token"])


def test_blocks_are_stacked_in_their_order(student):
    state, variables = student
    blocks = variables["params"]["encoder"]["blocks"]
    assert blocks["attn"]["qkv"]["kernel"].shape == (3, 48, 144)
    for i in range(3):
        kernel = state[f"blocks.{i}.mlp.fc1.weight"].T
        np.testing.assert_array_equal(blocks["fc1"]["kernel"][i], kernel)
        np.testing.assert_array_equal(blocks["norm2"]["bias"][i], state[f"blocks.{i}.norm2.bias"])


def test_more_than_ten_blocks_keep_their_numerical_order(student):
    state = {key: value for key, value in student[0].items() if not key.startswith("blocks.")}
    for key, value in student[0].items():
        if key.startswith("blocks.0."):
            state |= {key.replace(".0.", f".{i}.", 1): np.full_like(value, i) for i in range(12)}
    bias = torch_names.student_from_torch(state)["params"]["encoder"]["blocks"]["fc1"]["bias"]
    np.testing.assert_array_equal(bias[:, 0], np.arange(12))


def test_layouts_put_every_weight_where_the_formula_says(student):
    """Each layout against a plain sum with torch's index order, on one output element."""
    state, variables = student
    params = variables["params"]
    pixels = np.random.default_rng(0).normal(size=(16, 16, 3))
    by_torch = np.einsum("cij,ijc->", state["patch_embed.proj.weight"][7], pixels)
    assert pixels.ravel() @ params["patch_kernel"][:, 7] == pytest.approx(by_torch, rel=1e-5)
    x = np.random.default_rng(1).normal(size=48)
    weight = state["simfp_2.0.weight"]  # (in, out, kh, kw)
    kernel = params["fpn"]["layer1_up1"]["kernel"]  # (in, kh, kw, out)
    assert x @ kernel[:, 1, 0, 5] == pytest.approx(x @ weight[:, 5, 1, 0], rel=1e-5)
    weight, kernel = state["simfp_4.1.weight"], params["fpn"]["layer3_conv2"]["conv"]["kernel"]
    assert kernel[2, 0, 3, 4] == weight[4, 3, 2, 0]


@pytest.mark.parametrize("key", ["cls_token", "blocks.1.attn.qkv.bias", "simfp_3.2.norm.weight"])
def test_missing_student_tensor_is_named(student, key):
    state = {k: v for k, v in student[0].items() if k != key}
    with pytest.raises(ValueError, match=rf"not an MMR student: 1 tensors missing: {key}"):
        torch_names.student_from_torch(state)


def test_a_block_of_another_shape_is_named_with_both(student):
    odd = {**student[0], "blocks.2.mlp.fc1.weight": np.zeros((96, 48), np.float32)}
    wanted = r"blocks.2.mlp.fc1.weight has shape \(96, 48\), blocks.0.* has \(192, 48\)"
    with pytest.raises(ValueError, match=wanted):
        torch_names.student_from_torch(odd)


def test_unneeded_pyramid_stages_may_be_missing(student):
    state = {k: v for k, v in student[0].items() if is_of_layer(k, (2, 3))}
    assert torch_names.student_from_torch(state, (2, 3))["params"]["fpn"]


# --- merging a MAE checkpoint


@pytest.fixture
def mae(read):
    """A MAE checkpoint for the small student: encoder, decoder and its mask token."""
    state = {
        key: value
        for key, value in read("state_img64_lowvar").items()
        if not key.startswith(("simfp", "decoder"))
    }
    rng = np.random.default_rng(0)
    for key, shape in {
        "mask_token": (1, 1, 32),
        "decoder_pos_embed": (1, 197, 32),
        "decoder_embed.weight": (32, 48),
        "decoder_blocks.0.attn.qkv.weight": (96, 32),
        "decoder_norm.weight": (32,),
        "decoder_pred.bias": (768,),
    }.items():
        state[key] = rng.normal(size=shape).astype(np.float32)
    return state


def test_mae_encoder_is_taken_and_its_decoder_and_mask_token_are_not(student, mae):
    before = torch_names.student_to_torch(student[1])
    merged, report = torch_names.merge_student(student[1], mae)
    after = torch_names.student_to_torch(merged)
    assert after.keys() == before.keys()
    for key in after:
        from_mae = not key.startswith(("simfp", "decoder"))
        expected = mae[key] if from_mae else before[key]
        np.testing.assert_array_equal(after[key], expected, err_msg=key)
    assert sorted(report["used"]) == sorted(k for k in after if not k.startswith(("simfp", "dec")))
    assert report["missing"] == report["replaced"] == []
    assert report["unused"] == [k for k in mae if "decoder" in k or k == "mask_token"]


def test_merging_leaves_its_arguments_alone(student, mae):
    before = jax.tree.map(np.array, student[1])
    torch_names.merge_student(student[1], mae)
    jax.tree.map(np.testing.assert_array_equal, student[1], before)


def test_missing_tensors_of_the_encoder_are_refused_by_name(student, mae):
    del mae["norm.weight"], mae["blocks.2.norm1.bias"]
    mae["head.weight"] = np.zeros((10, 48), np.float32)
    with pytest.raises(ValueError, match=r"2 tensors missing: blocks.2.norm1.bias, norm.weight"):
        torch_names.merge_student(student[1], mae)


def test_a_classifiers_head_is_reported_as_unused(student, mae):
    mae["head.weight"] = np.zeros((10, 48), np.float32)
    _, report = torch_names.merge_student(student[1], mae)
    assert report["missing"] == []
    assert "head.weight" in report["unused"]


def test_encoder_without_class_token_is_used_and_reported(student, mae):
    del mae["cls_token"]
    merged, report = torch_names.merge_student(student[1], mae)
    assert report["missing"] == ["cls_token"]
    tokens = merged["params"]["cls_token"], student[1]["params"]["cls_token"]
    np.testing.assert_array_equal(*tokens)


def test_a_shallower_encoder_is_refused(student, mae):
    shallow = {key: value for key, value in mae.items() if not key.startswith("blocks.2.")}
    with pytest.raises(ValueError, match=r"12 tensors missing: blocks\.2\."):
        torch_names.merge_student(student[1], shallow)


def test_a_deeper_encoder_is_refused(student, mae):
    mae |= {k.replace("blocks.2", "blocks.3"): v for k, v in mae.items() if "blocks.2" in k}
    with pytest.raises(ValueError, match=r"12 tensors unexpected: blocks\.3\."):
        torch_names.merge_student(student[1], mae)


def fitted(variables, grid):
    """The student as it is built for images of `grid` patches."""
    fixed = positions.resize_table(positions.sincos_2d(48, (14, 14)), grid)
    decoder = positions.sincos_2d(48, grid)
    return {**variables, "positions": {"encoder_table": fixed, "decoder_table": decoder}}


@pytest.mark.parametrize("grid", [(4, 4), (4, 9), (5, 6), (7, 28)])
def test_learned_position_table_of_another_size_is_resized_and_reported(student, mae, grid):
    """24 x 24 patches, a timm ViT of 384 px; 4 x 9 and 7 x 28 are square numbers of patches."""
    table = np.random.default_rng(0).normal(size=(577, 48)).astype(np.float32)
    merged, report = torch_names.merge_student(
        fitted(student[1], grid), {**mae, "pos_embed": table[None]}, grid
    )
    expected = positions.resize_table(table, grid)
    assert expected.shape == (1 + grid[0] * grid[1], 48)
    np.testing.assert_array_equal(merged["positions"]["encoder_table"], expected)
    assert "pos_embed" in report["used"]
    assert report["replaced"] == ["encoder_table"]


def test_an_encoder_without_position_table_keeps_the_fixed_one(student, mae):
    del mae["pos_embed"]
    target = fitted(student[1], (4, 9))
    merged, report = torch_names.merge_student(target, mae, (4, 9))
    tables = merged["positions"]["encoder_table"], target["positions"]["encoder_table"]
    np.testing.assert_array_equal(*tables)
    assert report["missing"] == ["pos_embed"]


def test_official_student_is_used_at_another_image_size(read, student):
    """Its 14x14 table is resized; the decoder's is never resized but drawn for each size."""
    state = read("state_img64_sincos")
    same, report = torch_names.merge_student(fitted(student[1], (4, 4)), state)
    assert report["replaced"] == ["encoder_table"]
    np.testing.assert_array_equal(
        same["positions"]["decoder_table"], state["decoder_FPN_pos_embed"][0]
    )
    target = fitted(student[1], (6, 5))
    other, report = torch_names.merge_student(target, state, (6, 5))
    assert report["replaced"] == ["encoder_table", "decoder_table"]
    jax.tree.map(np.testing.assert_array_equal, other["positions"], target["positions"])


@pytest.mark.parametrize("rows", [196, 198, 1])
def test_position_table_of_no_square_grid_is_refused(student, mae, rows):
    mae["pos_embed"] = np.zeros((1, rows, 48), np.float32)
    with pytest.raises(ValueError, match=rf"pos_embed has {rows} rows: expected a class token"):
        torch_names.merge_student(fitted(student[1], (4, 4)), mae)


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (20, 20), (5, 6), (7, 28)])
def test_fixed_tables_leave_as_the_official_ones_and_come_back_bit_for_bit(student, grid):
    variables = fitted(student[1], grid)
    state = torch_names.student_to_torch(variables, grid)
    np.testing.assert_array_equal(state["pos_embed"][0], positions.sincos_2d(48, (14, 14)))
    again, _ = torch_names.merge_student(variables, state, grid)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (5, 6)])
def test_learned_tables_leave_as_they_are_and_come_back_bit_for_bit(student, grid):
    variables = fitted(student[1], grid)
    variables["positions"]["encoder_table"] += np.float32(0.5)
    state = torch_names.student_to_torch(variables, grid)
    assert state["pos_embed"].shape == (1, 1 + grid[0] * grid[1], 48)
    again, _ = torch_names.merge_student(variables, state, grid)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_learned_table_that_would_be_misread_is_not_exported(student):
    variables = fitted(student[1], (4, 9))
    variables["positions"]["encoder_table"] += np.float32(0.5)
    with pytest.raises(ValueError, match="4 x 9 patches would be taken for one of 6 x 6"):
        torch_names.student_to_torch(variables, (4, 9))


def test_encoder_survives_the_round_trip_bit_for_bit(student, mae):
    variables = torch_names.encoder_from_torch(mae)
    assert set(variables["params"]) == {"cls_token", "patch_kernel", "patch_bias", "encoder"}
    state = torch_names.encoder_to_torch(variables)
    assert state.keys() == {k for k in mae if "decoder" not in k and k != "mask_token"}
    again = torch_names.encoder_from_torch(state)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


@pytest.mark.parametrize("key", ["blocks.0.attn.q_norm.weight", "norm_pre.weight", "reg_token"])
def test_encoder_with_parts_that_ours_does_not_have_is_refused(student, mae, key):
    mae[key] = np.ones(48, np.float32)
    with pytest.raises(ValueError, match=f"1 tensors unexpected: {key}"):
        torch_names.merge_student(student[1], mae)


def test_half_precision_checkpoint_becomes_float32(student, mae):
    half = {key: value.astype(np.float16) for key, value in mae.items()}
    merged, _ = torch_names.merge_student(student[1], half)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {np.dtype(np.float32)}


def test_checkpoint_of_another_width_is_refused_with_both_shapes(student, mae):
    wider = {key: np.repeat(value, 2, axis=-1) for key, value in mae.items()}
    wanted = r"not an encoder of this shape: .*cls_token: given \(1, 1, 96\) expected \(1, 1, 48\)"
    with pytest.raises(ValueError, match=wanted):
        torch_names.merge_student(student[1], wider)


def test_state_without_transformer_blocks_is_no_checkpoint(student, golden_dir):
    state = source.read(golden_dir / "teacher/state_reduced_resnet18.safetensors")[0]
    with pytest.raises(ValueError, match="not an encoder of this shape: 40 tensors missing"):
        torch_names.merge_student(student[1], state)


# --- teacher


BASIC = resnet.Architecture((2, 1, 1), bottleneck=False, stem=4, widths=(4, 6, 8))
BOTTLENECK = resnet.Architecture(
    (1, 2, 1), bottleneck=True, inner_factor=2, stem=4, widths=(3, 4, 5)
)


def random_state(arch: resnet.Architecture) -> dict[str, np.ndarray]:
    """An unfolded torchvision state, every value random, some variances as small as epsilon."""
    rng = np.random.default_rng(0)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(resnet.ResNet(arch).init, jax.random.key(0), image)["params"]
    state = {}
    for conv, bn, path in resnet_names.names(arch):
        module = shapes
        for part in path.split("/"):
            module = module[part]
        kh, kw, c, o = module["kernel"].shape
        state[f"{conv}.weight"] = rng.normal(0, (kh * kw * c) ** -0.5, (o, c, kh, kw))
        state[f"{bn}.weight"] = rng.normal(1, 0.3, o)
        state[f"{bn}.bias"] = rng.normal(0, 0.3, o)
        state[f"{bn}.running_mean"] = rng.normal(0, 0.1, o)
        state[f"{bn}.running_var"] = np.where(np.arange(o) % 3, rng.uniform(0.5, 2, o), 1e-5)
        # Where the variance is tiny, so is the signal; else one channel would drown the others.
        state[f"{conv}.weight"][::3] *= 3e-3
        state[f"{bn}.running_mean"][::3] *= 3e-3
    return {key: value.astype(np.float32) for key, value in state.items()}


def convolve(x: np.ndarray, weight: np.ndarray, stride: int) -> np.ndarray:
    """Torch's convolution with padding k // 2; x [c, h, w], weight [o, c, k, k], in float64."""
    k = weight.shape[-1]
    x = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))
    return np.einsum("chwij,ocij->ohw", windows[:, ::stride, ::stride], weight.astype(np.float64))


def unfolded(state: dict, arch: resnet.Architecture, x: np.ndarray) -> list[np.ndarray]:
    """The ResNet as torchvision computes it, convolution and BatchNorm apart; x [3, h, w]."""

    def conv_bn(x, conv, bn, stride=1):
        y = convolve(x, state[f"{conv}.weight"], stride)
        mean, var, gamma, beta = (
            state[f"{bn}.{part}"].astype(np.float64)[:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / np.sqrt(var + 1e-5) * gamma + beta

    x = np.maximum(conv_bn(x, "conv1", "bn1", 2), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2)).max((-2, -1))[:, ::2, ::2]
    features = []
    for layer, blocks in enumerate(arch.blocks, start=1):
        for i in range(blocks):
            name, y = f"layer{layer}.{i}", x
            stride = 2 if layer > 1 and i == 0 else 1
            convs = (1, 2, 3) if arch.bottleneck else (1, 2)
            for c in convs:
                # Stride on the 3x3: the second convolution of a bottleneck, else the first.
                strided = c == (2 if arch.bottleneck else 1)
                y = conv_bn(y, f"{name}.conv{c}", f"{name}.bn{c}", stride if strided else 1)
                y = np.maximum(y, 0) if c != convs[-1] else y
            if f"{name}.downsample.0.weight" in state:
                x = conv_bn(x, f"{name}.downsample.0", f"{name}.downsample.1", stride)
            x = np.maximum(x + y, 0)
        features.append(x)
    return features


@pytest.mark.parametrize("arch", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
def test_folded_teacher_leaves_and_comes_back_bit_for_bit(arch):
    state = random_state(arch)
    variables = teachers.from_torch(state, arch)
    variables["params"]["conv1"]["bias"][0] = -0.0
    left = teachers.to_torch(variables, arch)
    assert {key: value.shape for key, value in left.items()} == {
        key: value.shape for key, value in state.items()
    }
    again = teachers.from_torch(left, arch)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32)),
        again,
        variables,
    )


@pytest.mark.parametrize("arch", [BASIC, BOTTLENECK], ids=["basic", "bottleneck"])
def test_folded_teacher_equals_convolution_and_batch_norm_apart(arch):
    state = random_state(arch)
    x = np.random.default_rng(1).normal(size=(3, 32, 32))
    variables = teachers.from_torch(state, arch)
    image = jnp.asarray(x.transpose(1, 2, 0)[None], jnp.float32)
    got = jax.jit(resnet.ResNet(arch).apply)(variables, image)
    for layer, expected in enumerate(unfolded(state, arch, x), start=1):
        assert expected.std() > 0.1  # no vanishing features that would be equal anyway
        result = np.asarray(got[layer][0]).transpose(2, 0, 1)
        np.testing.assert_allclose(result, expected, atol=2e-5 * expected.max())


def test_folding_is_float32_and_ignores_the_head(golden_dir):
    state = random_state(BASIC)
    plain = teachers.from_torch(state, BASIC)
    state |= {"fc.weight": np.zeros((2, 2)), "layer4.0.conv1.weight": np.zeros((1, 1, 1, 1))}
    state |= {
        "bn1.num_batches_tracked": np.array(7),
        "layer1.0.bn1.num_batches_tracked": np.ones(1),
    }
    double = {key: np.asarray(value, np.float64) for key, value in state.items()}
    again = teachers.from_torch(double, BASIC)
    jax.tree.map(np.testing.assert_array_equal, again, plain)
    assert {leaf.dtype for leaf in jax.tree.leaves(again)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (resnet.Architecture((2, 2, 1), False, stem=4, widths=(4, 6, 8)), "layer2.1.conv1.weight"),
        (resnet.Architecture((2, 1, 1), True, stem=4, widths=(4, 6, 8)), "layer1.0.conv3.weight"),
    ],
    ids=["fewer blocks", "no bottleneck"],
)
def test_state_that_lacks_tensors_is_of_another_architecture(other, named):
    with pytest.raises(ValueError, match=rf"another architecture: \d+ tensors missing: .*{named}"):
        teachers.from_torch(random_state(BASIC), other)


def test_state_with_more_blocks_is_of_another_architecture():
    fewer = resnet.Architecture((1, 1, 1), bottleneck=False, stem=4, widths=(4, 6, 8))
    with pytest.raises(ValueError, match=r"architecture: 10 tensors unexpected: layer1\.1\.conv1"):
        teachers.from_torch(random_state(BASIC), fewer)


def test_a_student_is_no_teacher(student):
    with pytest.raises(ValueError, match=r"another architecture: .*conv1\.weight"):
        teachers.from_torch(student[0], BASIC)

"""The PyTorch twin against the official code's numbers (tests/golden, see the README there)."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
pytestmark = pytest.mark.torch

from safetensors.torch import load_file, save_file  # noqa: E402

from mmrjax.weights import torch_twin as mmr  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"

REDUCED = {"stem": 8, "planes": (8, 16, 32)}
WIDE = (256, 512, 1024)
STATES = {"img64": "state_img64", "sincos": "state_img64_sincos", "lowvar": "state_img64_lowvar"}


def golden(name: str) -> dict:
    return dict(np.load(GOLDEN / name))


def reduced_student(state: str = "img64"):
    return mmr.load_student(GOLDEN / "student" / f"{STATES[state]}.safetensors", heads=3)


def reduced_teacher(**sizes):
    path = GOLDEN / "teacher" / "state_reduced_resnet18.safetensors"
    return mmr.load_teacher(path, "resnet18", **REDUCED, **sizes)


def tiny_student(**changes):
    sizes = {"image_size": 32, "width": 24, "depth": 2, "heads": 2, "teacher_channels": (8, 16, 32)}
    torch.manual_seed(0)
    return mmr.MMRStudent(**{**sizes, **changes})


def scales(prefix: str, source: dict, dtype=torch.float32) -> dict:
    return {f"layer{i + 1}": torch.tensor(source[f"{prefix}{i}"], dtype=dtype) for i in range(3)}


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- student


@pytest.mark.parametrize(
    ("state", "case", "ratio"),
    [
        ("img64", "img64_m40", 0.4),
        ("img64", "img64_m00", 0.0),
        ("img64", "img64_m75", 0.75),
        ("img64", "img64_m00_altshuffle", 0.0),
        ("sincos", "img64_sincos_m40", 0.4),
        ("sincos", "img64_sincos_m00", 0.0),
        ("lowvar", "img64_lowvar_m40", 0.4),
        ("lowvar", "img64_lowvar_m00", 0.0),
    ],
)
def test_student_equals_the_official_code(state, case, ratio):
    inputs, expected = golden("student/inputs.npz"), golden("student/outputs.npz")
    noise = inputs["img64__noise"]
    if case.endswith("altshuffle"):  # the noise whose order is the stored one
        noise = np.argsort(inputs["img64__ids_shuffle_alt"], axis=1)
    with torch.no_grad():
        out = reduced_student(state)(
            torch.tensor(inputs["img64__x"]), ratio, torch.tensor(noise, dtype=torch.float32)
        )
    for name in (*mmr.LAYERS, "latent"):
        np.testing.assert_allclose(out[name], expected[f"{case}__{name}"], rtol=0, atol=5e-5)
    np.testing.assert_array_equal(out["mask"], expected[f"{case}__mask"])


def test_student_keys_and_shapes_are_the_official_ones():
    keys = json.loads((GOLDEN / "student/keys.json").read_text())
    student = mmr.MMRStudent(width=48, depth=3, heads=3, teacher_channels=(16, 32, 64))
    assert {name: list(value.shape) for name, value in student.state_dict().items()} == keys


def test_student_refuses_a_state_with_a_missing_tensor():
    state = load_file(GOLDEN / "student/state_img64.safetensors")
    del state["simfp_4.1.norm.bias"]
    student = tiny_student(image_size=64, width=48, depth=3, heads=3, teacher_channels=(16, 32, 64))
    with pytest.raises(RuntimeError, match=r"simfp_4\.1\.norm\.bias"):
        student.load_state_dict(state, strict=True)


def test_a_teacher_is_not_taken_for_a_student():
    with pytest.raises(ValueError, match=r"state_reduced_resnet18.* holds no MMR student, but bn1"):
        mmr.load_student(GOLDEN / "teacher" / "state_reduced_resnet18.safetensors")


@pytest.mark.parametrize(("width", "grid"), [(48, 14), (48, 4), (768, 14)])
def test_position_table_equals_the_official_one(width, grid):
    expected = golden("student/outputs.npz")[f"sincos_D{width}_G{grid}"]
    np.testing.assert_allclose(mmr.sincos_table(width, grid)[0], expected, rtol=0, atol=1e-7)


def test_kept_tokens_follow_the_official_table():
    table = golden("student/outputs.npz")
    got = [[mmr.kept_tokens(n, r) for r in table["len_keep__ratio"]] for n in table["len_keep__L"]]
    np.testing.assert_array_equal(got, table["len_keep__table"])


def test_dropped_patches_do_not_reach_the_prediction():
    student = tiny_student()
    images, noise = torch.randn(2, 3, 32, 32), torch.tensor([[0.1, 0.9, 0.2, 0.8]] * 2)
    changed = images.clone()
    changed[:, :, :, 16:] += 5  # the patches 1 and 3, which the noise drops at ratio 0.5
    with torch.no_grad():
        a, b, c = student(images, 0.5, noise), student(changed, 0.5, noise), student(changed, 0.0)
    for name in mmr.LAYERS:
        assert torch.equal(a[name], b[name])
        assert (a[name] - c[name]).abs().max() > 1e-3


def test_initialisation_is_the_official_one():
    student = tiny_student(width=192, heads=3)
    state = student.state_dict()
    bounds = {"blocks.0.attn.qkv.weight": 192 + 576, "patch_embed.proj.weight": 192 + 768}
    for name, fans in bounds.items():
        bound = (6 / fans) ** 0.5
        assert 0.98 * bound < state[name].abs().max() <= bound
    bounds = {"simfp_2.0.weight": 96 * 4, "simfp_2.5.weight": 8 * 9}  # transposed: outputs x 2 x 2
    for name, fan_in in bounds.items():
        assert 0.95 / fan_in**0.5 < state[name].abs().max() <= 1 / fan_in**0.5
    assert state["patch_embed.proj.bias"].abs().max() > 0
    assert all(not state[name].any() for name in state if name.endswith(("qkv.bias", "fc1.bias")))
    for name in ("cls_token", "decoder_FPN_mask_token"):
        assert 0.015 < state[name].std() < 0.025


def test_parameter_counts_are_those_of_the_paper_models():
    with torch.device("meta"):
        student, small = mmr.MMRStudent(), mmr.MMRStudent(teacher_channels=(64, 128, 256))
    pyramid = [count(getattr(student, f"simfp_{i}")) for i in (2, 3, 4)]
    assert count(student.blocks[0]) == 7_087_872
    assert pyramid == [2_115_904, 3_737_984, 10_227_712]
    assert count(student) == 101_729_728
    assert count(student) - sum(pyramid) - student.decoder_FPN_mask_token.numel() == 85_647_360
    assert student.pos_embed.numel() == 151_296
    assert [count(getattr(small, f"simfp_{i}")) for i in (2, 3, 4)] == [
        1_525_312,
        1_377_152,
        787_456,
    ]
    assert count(small) == 89_338_048


# --- teacher


@pytest.mark.parametrize("size", [64, 75])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_teacher_equals_the_official_code(size, memory_format):
    values = golden("teacher/reduced_io.npz")
    images = torch.tensor(values[f"x_s{size}"]).contiguous(memory_format=memory_format)
    maps = reduced_teacher().to(memory_format=memory_format)(images)
    for name in mmr.LAYERS:
        expected = values[f"reduced_resnet18_s{size}__{name}"]
        np.testing.assert_allclose(maps[name], expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("arch", "full"),  # torchvision's published totals
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("wide_resnet50_2", 68_883_240),
        ("wide_resnet101_2", 126_886_696),
    ],
)
def test_teacher_parameter_counts_are_those_of_torchvision(arch, full):
    with torch.device("meta"):
        teacher = mmr.ResNetTeacher(arch, stages=4)
    classifier = 2 * teacher.channels[2] * 1000 + 1000
    assert count(teacher) + classifier == full


def test_bottleneck_has_its_stride_on_the_3x3_and_the_double_width():
    torch.manual_seed(0)
    block = mmr.ResNetTeacher("wide_resnet50_2", **REDUCED).layer2[0]
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    assert block.conv2.weight.shape == (32, 32, 3, 3)
    w, conv = block.state_dict(), torch.nn.functional.conv2d

    def norm(x, name):
        mean, var, gain, bias = (
            w[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x = torch.randn(2, 32, 9, 9)
    y = norm(conv(x, w["conv1.weight"]), "bn1").relu()
    y = norm(conv(y, w["conv2.weight"], stride=2, padding=1), "bn2").relu()
    y = norm(conv(y, w["conv3.weight"]), "bn3")
    shortcut = norm(conv(x, w["downsample.0.weight"], stride=2), "downsample.1")
    np.testing.assert_allclose(block(x), (y + shortcut).relu(), rtol=0, atol=1e-4)


def test_teacher_through_layer3_has_the_expected_size():
    with torch.device("meta"):
        sizes = {a: mmr.ResNetTeacher(a) for a in ("wide_resnet50_2", "resnet18")}
    assert count(sizes["wide_resnet50_2"]) == 24_862_528
    assert sizes["wide_resnet50_2"].channels == WIDE
    assert count(sizes["resnet18"]) == 2_782_784


def test_teacher_stays_frozen_and_in_evaluation_mode():
    teacher = reduced_teacher().train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_unknown_teacher_is_refused_with_the_names():
    with pytest.raises(ValueError, match="wide_resnet50_2"):
        mmr.ResNetTeacher("resnet19")


def test_real_teacher_loads_strictly(shared):
    path = shared / "weights/resnet18_imagenet1k_v1_layer1to3.safetensors"
    maps = mmr.load_teacher(path, "resnet18")(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert all(m.isfinite().all() and m.min() == 0 and m.max() > 0 for m in maps.values())


# --- loss and maps


def test_loss_and_gradients_equal_the_official_code():
    inputs, expected = golden("maps/inputs.npz"), golden("maps/outputs.npz")
    student, teacher = scales("small__student", inputs), scales("small__teacher", inputs)
    for z in student.values():
        z.requires_grad_()
    loss = mmr.mmr_loss(student, teacher)
    loss.backward()
    np.testing.assert_allclose(loss.detach(), expected["small__loss"], rtol=0, atol=1e-6)
    for i, z in enumerate(student.values()):
        gradient = expected[f"small__grad_student{i}"]
        np.testing.assert_allclose(z.grad, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


def test_loss_has_its_closed_forms():
    torch.manual_seed(0)
    maps = {name: torch.randn(2, 8, 4, 4, dtype=torch.float64) for name in mmr.LAYERS}
    gain = {name: torch.rand(2, 1, 4, 4, dtype=torch.float64) + 0.1 for name in mmr.LAYERS}
    same = {name: gain[name] * maps[name] for name in mmr.LAYERS}
    opposite = {name: -maps[name] for name in mmr.LAYERS}
    left, right = ({n: torch.eye(2)[i].reshape(1, 2, 1, 1) for n in mmr.LAYERS} for i in (0, 1))
    assert float(mmr.mmr_loss(same, maps)) == pytest.approx(0, abs=1e-12)
    assert float(mmr.mmr_loss(opposite, maps)) == pytest.approx(6, abs=1e-12)
    assert float(mmr.mmr_loss(left, right)) == pytest.approx(3, abs=1e-12)
    assert torch.equal(
        mmr.cosine_distance(0 * left["layer1"], right["layer1"]), torch.ones(1, 1, 1)
    )


def test_gradient_is_finite_at_zero_and_tiny_vectors():
    inputs = golden("maps/inputs.npz") | golden("maps/outputs.npz")
    student = torch.tensor(inputs["edge__student"], requires_grad=True)
    mmr.cosine_distance(student, torch.tensor(inputs["edge__teacher"])).mean().backward()
    assert student.grad.isfinite().all()


def test_anomaly_maps_and_scores_equal_the_official_code():
    inputs, expected = golden("maps/inputs.npz"), golden("maps/outputs.npz")
    student, teacher = scales("small__student", inputs), scales("small__teacher", inputs)
    raw, smooth = mmr.anomaly_maps(student, teacher, 64, 0), mmr.anomaly_maps(student, teacher, 64)
    np.testing.assert_allclose(raw, expected["small__amap_raw"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(smooth, expected["small__amap_smooth"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(
        mmr.image_scores(smooth), expected["small__score"], rtol=0, atol=5e-6
    )
    for size in (50, 224):
        raw = mmr.anomaly_maps(student, teacher, size, 0)[:1]
        np.testing.assert_allclose(raw, expected[f"small__amap_raw_out{size}"], rtol=0, atol=2e-5)


# --- training


def test_learning_rate_follows_the_official_table():
    table = {0: 0, 1: 2e-5, 49: 9.8e-4, 50: 1e-3, 118: 1e-3, 119: 1e-4, 158: 1e-4, 159: 1e-5}
    assert {e: pytest.approx(mmr.learning_rate(e), rel=1e-9) for e in table} == table
    assert mmr.learning_rate(0) == 0.0
    assert sum(mmr.learning_rate(e) for e in range(200)) == pytest.approx(0.09791, rel=1e-9)


def test_learning_rate_of_40_epochs_drops_at_23_and_31():
    rates = [mmr.learning_rate(e, 40, 2e-3) for e in range(40)]
    expected = [2e-4 * e for e in range(10)] + [2e-3] * 13 + [2e-4] * 8 + [2e-5] * 9
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_decay_spares_vectors_and_biases_but_not_the_tokens():
    student = tiny_student()
    names = {id(p): name for name, p in student.named_parameters()}
    plain, decayed = (
        ({names[id(p)] for p in group["params"]}, group["weight_decay"])
        for group in mmr.adamw_groups(student, 0.05)
    )
    assert (plain[1], decayed[1]) == (0.0, 0.05)
    assert {"cls_token", "decoder_FPN_mask_token", "simfp_2.0.weight"} <= decayed[0]
    assert all(n.endswith((".weight", "_token")) and "norm" not in n for n in decayed[0])
    assert {"norm.weight", "simfp_2.1.weight", "simfp_4.1.norm.weight"} <= plain[0]
    assert all(
        name.endswith(".bias") or "norm" in name or name == "simfp_2.1.weight" for name in plain[0]
    )
    assert len(plain[0]) + len(decayed[0]) == len(names)
    assert not any("pos_embed" in name for name in names.values())


def test_training_lowers_the_loss_and_moves_only_the_student():
    teacher, student = reduced_teacher(), tiny_student()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    frozen = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = mmr.make_optimizer(student)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.95), 1e-8)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 4)

    first = mmr.train_step(student, teacher, optimizer, images, 0.4, noise)  # epoch 0: rate 0
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    losses = [mmr.train_step(student, teacher, optimizer, images, 0.4, noise) for _ in range(30)]

    assert losses[-1] < 0.6 * first
    moved = {n for n, value in student.state_dict().items() if not torch.equal(value, before[n])}
    assert set(before) - moved == {"pos_embed", "decoder_FPN_pos_embed"}
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())


# --- programs


def test_photograph_is_turned_as_its_camera_noted(tmp_path):
    """As mmrjax's records are; the pixel rows of this one run from the bottom to the top."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:8] = 255
    for orientation, name in ((1, "upright"), (3, "turned")):
        exif = Image.Exif()
        exif[274] = orientation
        stored = pixels if orientation == 1 else pixels[::-1, ::-1]
        Image.fromarray(stored).save(tmp_path / f"{name}.png", exif=exif)
    upright, turned = (mmr.load_image(tmp_path / f"{n}.png", 32) for n in ("upright", "turned"))
    assert torch.equal(upright, turned)
    assert float(upright[0, 0, 0, 0]) > float(upright[0, 0, -1, 0])


def test_image_is_squashed_to_256_and_cropped_in_the_centre(tmp_path):
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[16:240, 16:240] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "part.png")
    image = mmr.load_image(tmp_path / "part.png", 224)
    red = (np.array([1.0, 0, 0]) - mmr.IMAGENET_MEAN) / mmr.IMAGENET_STD
    expected = np.broadcast_to(red[:, None, None], (3, 224, 224))
    np.testing.assert_allclose(image[0], expected, rtol=0, atol=1e-6)
    Image.fromarray(pixels).resize((300, 200)).save(tmp_path / "part.png")
    assert mmr.load_image(tmp_path / "part.png", 224).shape == (1, 3, 224, 224)
    view = {"image_size": (48, 80), "resize": (61, 83), "interpolation": "bicubic"}
    assert mmr.load_image(tmp_path / "part.png", **view).shape == (1, 3, 48, 80)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_students_of_any_shape_are_read_back(suffix, tmp_path):
    """Oblong images, a missing layer, a position table of their own size."""
    student = tiny_student(image_size=(32, 96), teacher_channels=(0, 16, 32)).eval()
    student.pos_embed = torch.randn(1, 13, 24)
    path, header = (
        tmp_path / f"x.{suffix}",
        {"heads": "2", "image_size": "32,96", "resize": "40,99"},
    )
    if suffix == "pth":  # holds no header: 12 patches are no square
        torch.save(student.state_dict(), path)
        with pytest.raises(RuntimeError, match="decoder_FPN_pos_embed"):
            mmr.load_student(path, heads=2)
        return
    save_file(student.state_dict(), path, metadata=header)
    again = mmr.load_student(path)
    assert again.view == {"image_size": (32, 96), "resize": (40, 99)}
    images = torch.randn(2, 3, 32, 96)
    with torch.no_grad():
        want, got = student(images, 0.0), again(images, 0.0)
    assert want.keys() == got.keys() == {"layer2", "layer3", "latent", "mask"}
    assert got["layer2"].shape == (2, 16, 4, 12)
    for name in ("layer2", "layer3"):  # the shuffle of the tokens only changes the rounding
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5)


def test_students_of_square_images_are_read_from_pth_files(tmp_path):
    student = tiny_student()
    torch.save(student.state_dict(), tmp_path / "x.pth")
    again = mmr.load_student(tmp_path / "x.pth", heads=2)
    assert again.image_size == (32, 32)
    assert again.view == {"image_size": (32, 32)}
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in again.state_dict().items())


def test_layer4_of_the_official_mode_changes_no_map():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 32)
    short = mmr.ResNetTeacher("resnet18", **REDUCED)
    full = mmr.ResNetTeacher("resnet18", stem=8, planes=(8, 16, 32, 64), stages=4)
    full.load_state_dict(short.state_dict(), strict=False)
    a, b = short(images), full(images)
    assert list(a) == list(b) == list(mmr.LAYERS)
    assert all(torch.equal(a[name], b[name]) for name in mmr.LAYERS)
    assert full.layer4[1].conv2.weight.shape == (64, 64, 3, 3)

"""Teachers against golden values of the official code, and their parameter counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import backbones, resnet
from mmrjax.weights import source, teachers


@pytest.mark.parametrize("size", [64, 75])  # 75: "SAME" padding would shift the result
def test_features_equal_the_official_code(golden_dir, agree, size):
    arch = resnet.Architecture((2, 2, 2), bottleneck=False, stem=8, widths=(8, 16, 32))
    folder = golden_dir / "teacher"
    state = source.read(folder / "state_reduced_resnet18.safetensors")[0]
    arrays = np.load(folder / "reduced_io.npz")
    image = jnp.asarray(arrays[f"x_s{size}"].transpose(0, 2, 3, 1))
    got = jax.jit(resnet.ResNet(arch).apply)(teachers.from_torch(state, arch), image)
    name = f"reduced_resnet18_s{size}"
    want = {layer: arrays[f"{name}__layer{layer}"].transpose(0, 2, 3, 1) for layer in (1, 2, 3)}
    agree(f"teacher, {size} px", got, want, 5e-5)


@pytest.mark.parametrize(
    ("name", "through_layer3", "parts"),
    [
        ("wide_resnet50_2", 24_862_528, [9_536, 634_368, 3_482_624, 20_736_000]),
        ("resnet18", 2_782_784, None),
    ],
)
def test_parameter_counts_through_layer3(name, through_layer3, parts):
    """Specs count gamma and beta of every BatchNorm; folding leaves one bias of the two."""
    arch = backbones.architecture(name)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(resnet.ResNet(arch).init, jax.random.key(0), image)["params"]
    counts = dict.fromkeys(("conv1", "layer1", "layer2", "layer3"), 0)
    for block, part in shapes.items():
        leaves = jax.tree.leaves(part)
        biases = sum(leaf.size for leaf in leaves if leaf.ndim == 1)
        counts[block.split("_")[0]] += sum(leaf.size for leaf in leaves) + biases
    assert sum(counts.values()) == through_layer3
    if parts:
        assert list(counts.values()) == parts


def test_pixels_are_normalised_as_torchvision_normalises_them():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3))
    want = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    got = backbones.build("resnet18").normalise(jnp.asarray(pixels, jnp.uint8) / 255.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_nothing_after_the_last_tap_is_computed():
    arch = backbones.architecture("resnet18")
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(resnet.ResNet(arch, layers=(1,)).init, jax.random.key(0), image)
    assert not any(name.startswith(("layer2", "layer3")) for name in shapes["params"])


@pytest.mark.parametrize("name", sorted(resnet.ARCHITECTURES))
def test_every_architecture_halves_and_widens(name):
    arch = backbones.architecture(name)
    image = jax.ShapeDtypeStruct((2, 224, 160, 3), jnp.float32)
    model = resnet.ResNet(arch)
    shapes, _ = jax.eval_shape(
        lambda k: model.init_with_output(k, jnp.zeros(image.shape)), jax.random.key(0)
    )
    for layer in (1, 2, 3):
        side = 2 ** (layer + 1)
        assert shapes[layer].shape == (2, 224 // side, 160 // side, arch.channels[layer - 1])


def test_unknown_teacher_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown teacher 'resnet19'; available: .*resnet18"):
        backbones.architecture("resnet19")


@pytest.mark.parametrize("size", [(32, 32), (34, 48)])
def test_the_stem_on_blocks_of_pixels_is_the_seven_by_seven_convolution(size):
    keys = jax.random.split(jax.random.key(0))
    images = jax.random.normal(keys[0], (2, *size, 3))
    kernel = jax.random.normal(keys[1], (7, 7, 3, 8))
    expected = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = resnet._folded_stem(images, kernel, (2, 2), None)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_in_bfloat16_the_stem_runs_on_blocks_and_takes_odd_sizes_as_before():
    network = resnet.ResNet(backbones.architecture("resnet18"), (1,), jnp.bfloat16)
    plain = resnet.ResNet(backbones.architecture("resnet18"), (1,))
    for side, kernel in ((32, "4x4x16x64"), (33, "7x7x3x64")):
        images = jnp.full((1, side, side, 3), 0.5)
        variables = plain.init(jax.random.key(0), images)
        lowered = jax.jit(network.apply).lower(variables, images).as_text()
        stem = next(line for line in lowered.splitlines() if "convolution" in line)
        assert kernel in stem
        found = network.apply(variables, images)[1].astype(jnp.float32)
        np.testing.assert_allclose(found, plain.apply(variables, images)[1], atol=0.05)


def test_a_backbone_numbers_its_taps_from_shallow_to_deep():
    backbone = backbones.build("resnet18", (1, 2), taps=(2, 3))
    assert backbone.layers == (1, 2)
    assert backbone.channels == {1: 128, 2: 256}
    assert backbone.strides == {1: 8, 2: 16}
    shapes = jax.eval_shape(
        lambda x: backbone.apply(backbone.module.init(jax.random.key(0), x), x),
        jnp.zeros((1, 64, 32, 3)),
    )
    assert {layer: x.shape for layer, x in shapes.items()} == {1: (1, 8, 4, 128), 2: (1, 4, 2, 256)}


def test_a_layer_or_tap_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="has layers 1 to 3"):
        backbones.build("resnet18", (4,))
    with pytest.raises(ValueError, match="after layers 1 to 3, not 4"):
        backbones.build("resnet18", taps=(2, 4))


@pytest.mark.parametrize("sides", [(64, 64), (45, 66)])
def test_the_caffe_form_strides_first_and_pools_without_padding(sides):
    """Against a plain PyTorch forward; random weights of every kind."""
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    conv, rng = torch.nn.functional.conv2d, np.random.default_rng(0)
    arch = resnet.Architecture((1, 2, 1), bottleneck=True, stem=4, widths=(2, 3, 4), caffe=True)
    module = resnet.ResNet(arch)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *sides, 3)))
    variables = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    image = rng.standard_normal((1, *sides, 3)).astype(np.float32)

    def run(x, part, **kwargs):
        kernel = torch.tensor(part["kernel"].transpose(3, 2, 0, 1).copy())
        return conv(x, kernel, torch.tensor(part["bias"]), padding=kernel.shape[-1] // 2, **kwargs)

    params = variables["params"]
    x = run(torch.tensor(image).permute(0, 3, 1, 2), params["conv1"], stride=2).relu()
    x = torch.nn.functional.max_pool2d(x, 3, 2, 0, ceil_mode=True)
    got = module.apply(variables, image)
    for layer, blocks in enumerate(arch.blocks, start=1):
        for i in range(blocks):
            part, step = params[f"layer{layer}_{i}"], 2 if layer > 1 and i == 0 else 1
            y = run(x, part["conv1"], stride=step).relu()
            y = run(run(y, part["conv2"]).relu(), part["conv3"])
            x = (y + (run(x, part["downsample"], stride=step) if i == 0 else x)).relu()
        want = x.permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(got[layer], want, atol=1e-5 * np.abs(want).max())

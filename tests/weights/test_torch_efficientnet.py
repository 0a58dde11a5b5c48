"""EfficientNet-lite in PyTorch gives the features and the maps that JAX gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax import methods, weights
from mmrjax.models import backbones
from mmrjax.weights import teachers

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
pytestmark = pytest.mark.torch


@pytest.mark.parametrize("sides", [(64, 64), (45, 66)])
def test_features_equal_those_of_jax(sides):
    from mmrjax.weights import torch_scorers

    _, variables, _ = weights.load_teacher("efficientnet_lite0", "embedded")
    backbone = backbones.build("efficientnet_lite0", taps=(2, 5))
    images = np.random.default_rng(0).random((2, *sides, 3)).astype(np.float32)
    want = backbone.apply(variables, backbone.normalise(images))
    state = teachers.to_torch(variables, backbone.arch)
    module = torch_scorers.teacher(state, "efficientnet_lite0", backbone, [sides])
    normalised = torch.tensor(np.asarray(backbone.normalise(images))).permute(0, 3, 1, 2)
    got = {name: x.permute(0, 2, 3, 1).numpy() for name, x in module(normalised).items()}
    assert got.keys() == {"layer1", "layer2"}
    for layer, x in want.items():
        scale = float(np.abs(x).max())
        np.testing.assert_allclose(got[f"layer{layer}"], x, atol=1e-5 * scale)


@pytest.mark.parametrize("name", ["patchcore", "mmr"])
def test_a_scorer_with_this_teacher_gives_the_maps_of_predict(name, tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.teacher.name, config.teacher.weights = "efficientnet_lite0", "embedded"
    config.patchcore.width, config.patchcore.layers = 0, (1, 3)
    config.patchcore.per_image = True
    method = methods.create(name, config)
    frozen, _ = method.load_frozen()
    variables, _ = method.init(jax.random.key(0), frozen)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    images = jnp.asarray(pixels) / 255.0
    if method.fit is not None:
        variables = method.fit(variables, frozen, [(images[:2], 2)], 2, jax.random.key(1))
    want = jax.jit(method.predict)(variables, frozen, images)["map"]
    with torch.no_grad():
        maps, scores = method.torch_scorer(variables, frozen)(torch.tensor(pixels))
    scale = float(want.max())
    np.testing.assert_allclose(maps.numpy(), want, atol=1e-4 * scale)
    np.testing.assert_allclose(scores.numpy(), method.score(want), rtol=1e-3)


def test_a_teacher_without_a_form_in_pytorch_is_named():
    from mmrjax.weights import torch_scorers

    backbone, variables, _ = weights.load_teacher("resnet50_caffe", "random")
    state = teachers.to_torch(variables, backbone.arch)
    with pytest.raises(ValueError, match=r"resnet50_caffe has no PyTorch form"):
        torch_scorers.teacher(state, "resnet50_caffe", backbone, [(64, 64)])

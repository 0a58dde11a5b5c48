"""Frozen ViTs in PyTorch against the JAX network, and PatchCore on them as a whole scorer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
pytestmark = pytest.mark.torch

from mmrjax import methods  # noqa: E402
from mmrjax.models import backbones, vit_backbone  # noqa: E402
from mmrjax.runtime import config as config_lib  # noqa: E402
from mmrjax.weights import torch_scorers, torch_vit, vit_names  # noqa: E402

PLAIN = vit_backbone.Architecture(32, 3, 2, 4, (1, 2, 3), 3)
KINDS = {
    "plain": {},
    "without a norm": {"normed": False},
    "dinov2": {"scaled": True, "masked": True, "registers": 4, "positions": "offset"},
    "swiglu": {"scaled": True, "swiglu": True, "hidden": 24},
    "dinov3": {"table": 0, "scaled": True, "masked": True, "registers": 4},
    "dinov3 plus": {"table": 0, "scaled": True, "registers": 4, "swiglu": True, "hidden": 24},
}


def drawn(arch) -> dict:
    """Variables of which none is 0 or 1 by rule."""
    leaves, structure = jax.tree.flatten(vit_names.random(arch, 0))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        structure, [x + rng.normal(0, 0.1, x.shape).astype(np.float32) for x in leaves]
    )


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("size", [(12, 12), (16, 20)], ids=str)
def test_maps_equal_the_jax_network(agree, kind, size):
    arch = dataclasses.replace(PLAIN, **KINDS[kind])
    # By way of the state dict: it masks the bias of DINOv3's keys.
    state = vit_names.to_torch(drawn(arch), arch)
    variables = vit_names.from_torch(state, arch)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    want = arch.module((1, 3), jnp.float32, "").apply(variables, images)
    state = vit_names.to_torch(variables, arch)
    network = torch_vit.ViT(state, arch, (1, 3), [size, (8, 8)])
    found = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    got = {tap: x.permute(0, 2, 3, 1).numpy() for tap, x in found.items()}
    agree(f"torch ViT, {kind}, {size}", got, dict(want), 1e-5)


@pytest.mark.parametrize("teacher", ["deit_tiny_patch16_224", "dinov2_vits14_reg4"])
def test_a_whole_scorer_on_a_vit_equals_the_method(tiny_config, teacher):
    config = tiny_config.copy_and_resolve_references()
    fields = [f"teacher.name={teacher}", "teacher.taps=1,2", "patchcore.layers=1,2"]
    config_lib.override(config, [*fields, "patchcore.scales=0.5,1.0"])
    method = methods.create("patchcore", config)
    frozen, _ = method.load_frozen()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    images = jnp.asarray(pixels) / 255.0
    variables = method.fit({"params": {}}, frozen, [(images, 3)], 3, jax.random.key(0))
    want = method.predict(variables, frozen, images)["map"]
    with torch.no_grad():
        found, score = method.torch_scorer(variables, frozen)(torch.from_numpy(pixels))
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-3, atol=1e-4 * float(want.max()))
    np.testing.assert_allclose(score.numpy(), method.score(want), rtol=1e-3)


def test_a_teacher_without_a_pytorch_form_is_named():
    with pytest.raises(ValueError, match="resnet50_caffe has no PyTorch form; use --output="):
        torch_scorers.teacher({}, "resnet50_caffe", backbones.build("resnet50_caffe"), [(64, 64)])

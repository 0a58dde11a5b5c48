"""MALA in PyTorch gives the maps and scores of MALA in JAX."""

import jax
import numpy as np
import pytest

from mmrjax import methods

torch = pytest.importorskip("torch", reason="needs the torch extra")
pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    "fields",
    [{}, {"tbm": "none"}, {"tbm": "gelu", "pixels": "half"}, {"pipeline": "reconstruct"}],
    ids=str,
)
def test_maps_and_scores_are_those_of_jax(fields, tiny_config):
    config = tiny_config.copy_and_resolve_references()
    config.mala.update(fields)
    config.data.image_size = (64, 96)
    method = methods.create("mala", config)
    drawn = jax.eval_shape(lambda key: method.init(key, {})[0], jax.random.key(0))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), drawn)
    images = rng.integers(0, 256, (3, 64, 96, 3), dtype=np.uint8)
    want = jax.jit(method.predict)(variables, {}, images / np.float32(255))["map"]
    with torch.no_grad():
        got, score = method.torch_scorer(variables, {})(torch.from_numpy(images))
    scale = max(1.0, float(np.abs(want).max()))
    assert np.ptp(want) > 1e-3
    np.testing.assert_allclose(got.numpy() / scale, want / scale, atol=2e-5)
    np.testing.assert_allclose(score.numpy() / scale, method.score(want) / scale, atol=2e-5)

"""Whole masked autoencoders under MAE's names: every bit comes back, nothing unfitting is taken."""

import json

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmrjax.models import mae
from mmrjax.weights import layouts, mae_names


@pytest.fixture(scope="module")
def state(golden_dir):
    keys = json.loads((golden_dir / "mae" / "keys.json").read_text())
    return {
        key.removeprefix("mae."): formula.formula_weights(key, shape) for key, shape in keys.items()
    }


@pytest.fixture(scope="module")
def drawn():
    model = mae.MaskedAutoencoder((4, 4), 96, 3, 3, 64, 2, 4)
    return jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))


def test_a_whole_autoencoder_survives_the_round_trip_bit_for_bit(state):
    again = mae_names.to_torch(mae_names.from_torch(state))
    assert again.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_names_and_shapes_of_the_large_model_are_the_published_ones(golden_dir):
    text = (golden_dir / "mae" / "keys_vit_large_patch16.json").read_text()
    published = {key: list(shape) for key, shape in json.loads(text).items()}
    model = mae.MaskedAutoencoder((14, 14), 1024, 24, 16)
    like = layouts.hollow(model.init, jnp.zeros((1, 224, 224, 3)))
    views = layouts.to_torch(like, mae_names.names(), "a masked autoencoder")
    assert {key: list(view.shape) for key, view in views.items()} == published


def test_a_whole_file_replaces_everything(state, drawn):
    variables, report = mae_names.merge(drawn, state, (4, 4))
    again = mae_names.to_torch(variables)
    for key, value in state.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    assert report["unused"] == report["missing"] == report["replaced"] == []


def test_an_encoder_alone_leaves_the_decoder_as_drawn(state, drawn):
    alone = {key: x for key, x in state.items() if "decoder" not in key and key != "mask_token"}
    alone |= {"head.weight": np.zeros((10, 96)), "head.bias": np.zeros(10)}
    variables, report = mae_names.merge(drawn, alone, (4, 4))
    assert sorted(report["unused"]) == ["head.bias", "head.weight"]
    np.testing.assert_array_equal(variables["params"]["cls_token"], state["cls_token"])
    jax.tree.map(
        np.testing.assert_array_equal, variables["params"]["decoder"], drawn["params"]["decoder"]
    )
    np.testing.assert_array_equal(variables["params"]["mask_token"], drawn["params"]["mask_token"])


def test_tables_of_another_image_size_are_resized_and_drawn(state):
    model = mae.MaskedAutoencoder((6, 6), 96, 3, 3, 64, 2, 4)
    drawn = jax.device_get(model.init(jax.random.key(0), jnp.zeros((1, 96, 96, 3))))
    variables, report = mae_names.merge(drawn, state, (6, 6))
    assert variables["positions"]["encoder_table"].shape == (37, 96)
    np.testing.assert_array_equal(
        variables["positions"]["decoder_table"], drawn["positions"]["decoder_table"]
    )
    assert sorted(report["replaced"]) == ["decoder_table", "encoder_table"]


def test_another_shape_is_refused_naming_both(state, drawn):
    wrong = {**state, "decoder_norm.weight": np.zeros(32, np.float32)}
    with pytest.raises(ValueError, match=r"decoder_norm.weight: given \(32,\) expected \(64,\)"):
        mae_names.merge(drawn, wrong, (4, 4))
    lacking = {key: x for key, x in state.items() if key != "decoder_pred.bias"}
    with pytest.raises(ValueError, match=r"1 tensors missing: decoder_pred.bias"):
        mae_names.merge(drawn, lacking, (4, 4))

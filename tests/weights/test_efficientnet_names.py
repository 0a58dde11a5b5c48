"""EfficientNet-lite: both sets of names, the way back, and the file in the box."""

import numpy as np
import pytest

from mmrjax import weights
from mmrjax.models import backbones
from mmrjax.weights import efficientnet_names as names
from mmrjax.weights import layouts, source, teachers

ARCH = backbones.architecture("efficientnet_lite0")
LITE0 = source.PACKAGED["efficientnet_lite0"]


@pytest.fixture(scope="module")
def state():
    return source.read(source.packaged_file(LITE0))[0]


def test_the_way_through_timms_names_returns_the_same_bits(state):
    variables = teachers.from_torch(state, ARCH)
    left = teachers.to_torch(variables, ARCH)
    assert {"conv_stem.weight", "blocks.0.0.conv_pw.weight", "blocks.6.0.bn3.bias"} <= left.keys()
    back, first = layouts.flatten(teachers.from_torch(left, ARCH)), layouts.flatten(variables)
    assert back.keys() == first.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(back[path], value)


def test_a_block_without_expansion_has_names_of_its_own():
    """timm calls the projection of its first block conv_pw, the expansion of others too."""
    timm = {path: (conv, bn) for conv, bn, path in names.names(ARCH)}
    assert timm["stage1_0/depthwise"] == ("blocks.0.0.conv_dw", "blocks.0.0.bn1")
    assert timm["stage1_0/project"] == ("blocks.0.0.conv_pw", "blocks.0.0.bn2")
    assert "stage1_0/expand" not in timm
    assert timm["stage3_1/expand"] == ("blocks.2.1.conv_pw", "blocks.2.1.bn1")
    assert timm["stage3_1/project"] == ("blocks.2.1.conv_pwl", "blocks.2.1.bn3")
    pypi = {path: conv for conv, _, path in names.names(ARCH, pypi=True)}
    assert pypi["stage3_1/expand"] == "_blocks.4._expand_conv"


def test_weights_of_another_member_are_refused_with_their_shapes(state):
    with pytest.raises(ValueError, match=r"another architecture: 75 tensors missing: blocks\.5"):
        teachers.from_torch(state, backbones.architecture("efficientnet_lite1"))


def test_random_weights_keep_the_scale_of_features():
    backbone, variables, facts = weights.load_teacher("efficientnet_lite0", "random", seed=1)
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    for x in backbone.apply(variables, images).values():
        assert 1e-3 < float(np.std(x)) < 1e3
    assert facts["random"]


def test_a_file_of_another_hash_is_refused_before_it_is_read(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "x.pth").write_bytes(b"not what was published")
    monkeypatch.syspath_prepend(tmp_path)
    packaged = source.Packaged("some-weights", "some_weights/x.pth", "0" * 64, "none")
    with pytest.raises(ValueError, match="nothing of it was read: pip install --force-reinstall"):
        source.packaged_file(packaged)


def test_a_package_that_is_not_installed_is_named():
    packaged = source.Packaged("absent-weights", "absent_weights/x.pth", "0" * 64, "none")
    with pytest.raises(FileNotFoundError, match="pip install absent-weights"):
        source.packaged_file(packaged)

"""Teachers and student initialisation: what methods get, and what the results say about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from mmrjax import weights
from mmrjax.models import backbones, positions, resnet, student
from mmrjax.weights import resnet_names, source, storage, torch_names

RESNET18 = backbones.architecture("resnet18")


def leaves(tree) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@pytest.fixture(scope="module")
def random_teacher():
    return weights.load_teacher("resnet18", "random", seed=3)[1:]


# --- random teachers


def test_random_teacher_depends_on_its_seed_alone(random_teacher):
    state = np.random.get_state()
    try:
        np.random.seed(0)
        _, again, _ = weights.load_teacher("resnet18", "random", seed=3)
    finally:
        np.random.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, again, random_teacher[0])
    _, other, _ = weights.load_teacher("resnet18", "random", seed=4)
    for name, leaf in leaves(other).items():
        if leaf.ndim == 4:
            assert not np.array_equal(leaf, leaves(random_teacher[0])[name]), name


def test_random_teacher_is_kaiming_normal_by_fan_out(random_teacher):
    for name, leaf in leaves(random_teacher[0]).items():
        assert leaf.dtype == np.float32
        if leaf.ndim == 1:
            assert not leaf.any(), name  # BatchNorm of mean 0, variance 1, folded
            continue
        kh, kw, _, out = leaf.shape
        deviation = (2 / (kh * kw * out)) ** 0.5
        assert leaf.std() == pytest.approx(deviation, rel=4 / (2 * leaf.size) ** 0.5), name
        assert abs(leaf.mean()) < 4 * deviation / leaf.size**0.5, name
        assert np.abs(leaf).max() > 3 * deviation, name  # normal, not uniform


def test_random_teacher_has_the_structure_of_the_model_and_says_it_is_random(random_teacher):
    variables, facts = random_teacher
    image = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(resnet.ResNet(RESNET18).init, jax.random.key(0), image)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
    assert facts == {
        "name": "resnet18",
        "source": "random, seed 3",
        "sha256": None,
        "licence": None,
        "random": True,
    }


def test_unknown_teacher_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown teacher 'vgg'; available: .*wide_resnet50_2"):
        weights.load_teacher("vgg", "random")


# --- teachers from files


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, random_teacher):
    """A torchvision-like file of the random teacher, BatchNorm written as identity."""
    state = {}
    for conv, bn, path in resnet_names.names(RESNET18):
        kernel = leaves(random_teacher[0])[f"params/{path}/kernel"]
        state[f"{conv}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        ones = np.ones(kernel.shape[-1], np.float32)
        state |= {f"{bn}.weight": ones, f"{bn}.bias": 0 * ones, f"{bn}.running_mean": 0 * ones}
        state[f"{bn}.running_var"] = ones - np.float32(1e-5)
    path = tmp_path_factory.mktemp("teacher") / "mine.safetensors"
    safetensors.numpy.save_file(state, path)
    return path


def test_teacher_from_a_file_is_that_teacher_and_not_random(random_teacher, teacher_file):
    _, variables, facts = weights.load_teacher("resnet18", str(teacher_file))
    for name, leaf in leaves(random_teacher[0]).items():
        np.testing.assert_allclose(leaves(variables)[name], leaf, rtol=1e-6, err_msg=name)
    assert facts["random"] is False
    assert (facts["name"], facts["source"]) == ("resnet18", "mine.safetensors")
    assert facts["sha256"] == source.sha256(teacher_file)
    assert facts["licence"] == "unknown: a local file"


def test_only_a_file_of_ours_is_believed_about_where_its_weights_are_from(
    tmp_path, random_teacher, teacher_file
):
    """A state dict of PyTorch's may have been trained on, and saved with the same text."""
    known = {"source": "wide.pth", "sha256": "ab"}
    about = {"converted_from": "wide.pth", "converted_from_sha256": "ab"}
    about |= {"kind": "teacher", "arch": "resnet18"}
    storage.write(tmp_path / "ours.safetensors", random_teacher[0], about)
    _, _, facts = weights.load_teacher("resnet18", str(tmp_path / "ours.safetensors"))
    assert facts["converted_from"] == known
    state = source.read(teacher_file)[0]
    storage.write_torch(tmp_path / "theirs.safetensors", state, about)
    _, _, facts = weights.load_teacher("resnet18", str(tmp_path / "theirs.safetensors"))
    assert "converted_from" not in facts


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_file_of_another_architecture_is_refused_with_its_tensors(teacher_file, name):
    wanted = rf"mine.safetensors' for teacher.name='{name}': weights of another arch.*missing: la"
    with pytest.raises(ValueError, match=wanted):
        weights.load_teacher(name, str(teacher_file))


def test_file_with_other_shapes_is_refused_with_both(golden_dir):
    path = golden_dir / "teacher/state_reduced_resnet18.safetensors"
    with pytest.raises(
        ValueError, match=r"conv1.weight: given \(8, 3, 7, 7\) expected \(64, 3, 7, 7\)"
    ):
        weights.load_teacher("resnet18", str(path))


def test_imagenet_teacher_comes_from_the_cache_with_its_licence(
    tmp_path, monkeypatch, teacher_file
):
    entry = source.Published(
        f"https://example.org/{teacher_file.name}", source.sha256(teacher_file)[:8], "terms"
    )
    monkeypatch.setenv("MMRJAX_CACHE", str(tmp_path))
    monkeypatch.setitem(source.IMAGENET, "resnet18", entry)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / entry.filename).write_bytes(teacher_file.read_bytes())
    _, _, facts = weights.load_teacher("resnet18", "imagenet")
    assert facts["licence"] == "terms"
    assert facts["random"] is False
    _, _, facts = weights.load_teacher("resnet18", str(teacher_file))  # the same file by its path
    assert facts["licence"] == "terms"


def test_real_resnet18_loads_and_sees(shared):
    path = shared / "weights/resnet18_imagenet1k_v1_layer1to3.safetensors"
    _, variables, facts = weights.load_teacher("resnet18", str(path))
    assert facts["random"] is False
    assert len(facts["sha256"]) == 64
    # Known of these weights: folded biases of the stem, and edge detectors that sum to about 0.
    kernel = variables["params"]["conv1"]["kernel"]
    assert kernel.shape == (7, 7, 3, 64)
    assert np.abs(kernel.sum(axis=(0, 1, 2))).mean() < 0.2 * np.abs(kernel).sum((0, 1, 2)).mean()
    ramp = np.linspace(-2, 2, 64, dtype=np.float32)
    image = np.broadcast_to(ramp[None, :, None], (1, 64, 64, 3))
    features = jax.jit(resnet.ResNet(RESNET18).apply)(variables, image)
    for layer, side in ((1, 16), (2, 8), (3, 4)):
        values = np.asarray(features[layer])
        assert values.shape == (1, side, side, 64 * 2 ** (layer - 1))
        assert np.isfinite(values).all()
        assert values.min() == 0  # after the ReLU
        assert 0.05 < values.std() < 5


# --- students

CHANNELS = {1: 16, 2: 32, 3: 64}


@pytest.fixture(scope="module")
def fresh():
    """Variables of the small golden student at its 64 px."""
    return small_student()


def small_student(depth=3):
    """Random values in the structure that `init` gives; compiling it would take a minute."""
    model = student.MaskedStudent(width=48, depth=depth, heads=3, channels=CHANNELS)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


@pytest.fixture(scope="module")
def official(golden_dir, fresh):
    """An official student state, tables as at 64 px."""
    state = source.read(golden_dir / "student/state_img64.safetensors")[0]
    tables = torch_names.student_to_torch(jax.device_get(fresh))
    return {**state, "pos_embed": tables["pos_embed"]}


def save(tmp_path, state) -> str:
    safetensors.numpy.save_file(state, tmp_path / "student.safetensors")
    return str(tmp_path / "student.safetensors")


def test_student_from_scratch_is_left_as_it_is(fresh):
    variables, facts = weights.init_student(fresh, "scratch", "base")
    assert variables is fresh
    assert facts == {"init": "scratch", "source": None, "sha256": None, "licence": None}


@pytest.mark.parametrize("size", ["tiny", "small", ""])
def test_mae_for_a_size_without_published_weights_says_which_have(fresh, size):
    with pytest.raises(
        ValueError, match=r"student.size in \['base', 'large'\], not '.*'; use 'scr"
    ):
        weights.init_student(fresh, "mae", size)


def test_mae_file_fills_the_encoder_only(tmp_path, fresh, official):
    mae = {k: v for k, v in official.items() if not k.startswith(("simfp", "decoder"))}
    mae["decoder_pred.bias"] = np.zeros(3, np.float32)
    path = save(tmp_path, mae)
    variables, facts = weights.init_student(fresh, path, "")
    got = torch_names.student_to_torch(jax.device_get(variables))
    before = torch_names.student_to_torch(jax.device_get(fresh))
    for key, value in got.items():
        expected = mae[key] if key in mae else before[key]
        np.testing.assert_array_equal(value, expected, err_msg=key)
    assert (facts["init"], facts["source"]) == (path, "student.safetensors")
    assert len(facts["sha256"]) == 64
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("sign", ["mask_token", "fixed table", ""])
def test_a_mae_file_given_by_its_path_has_maes_licence(tmp_path, fresh, official, sign):
    vit = {k: v for k, v in official.items() if not k.startswith(("simfp", "decoder"))}
    vit["pos_embed"] = np.random.default_rng(0).normal(size=(1, 17, 48)).astype(np.float32)
    if sign == "mask_token":
        vit[sign] = np.zeros((1, 1, 8), np.float32)
    if sign == "fixed table":
        vit["pos_embed"] = positions.sincos_2d(48, (14, 14))[None].astype(np.float16)
    _, facts = weights.init_student(fresh, save(tmp_path, vit), "")
    assert facts["licence"] == (source.MAE_LICENCE if sign else source.LOCAL)
    # What left a run of ours has the fixed table of a student from scratch.
    storage.write_torch(tmp_path / "left.safetensors", vit, {"kind": "encoder", "arch": "48,3,3"})
    _, facts = weights.init_student(fresh, str(tmp_path / "left.safetensors"), "")
    assert facts["licence"] == source.LOCAL


def test_whole_student_file_replaces_everything(tmp_path, fresh, official):
    variables, _ = weights.init_student(fresh, save(tmp_path, official), "")
    got = torch_names.student_to_torch(jax.device_get(variables))
    assert got.keys() == official.keys()
    for key, value in official.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


def test_whole_student_of_another_width_is_refused(tmp_path, fresh, official):
    wide = {**official, "norm.bias": np.zeros(96, np.float32)}
    with pytest.raises(ValueError, match=r"norm.bias: given \(96,\) expected \(48,\)"):
        weights.init_student(fresh, save(tmp_path, wide), "")


@pytest.mark.parametrize("depth", [2, 4])
def test_whole_student_of_another_depth_is_refused(tmp_path, official, depth):
    with pytest.raises(ValueError, match="blocks"):
        weights.init_student(small_student(depth=depth), save(tmp_path, official), "")


def test_whole_student_that_lacks_a_pyramid_stage_is_refused(tmp_path, fresh, official):
    part = {k: v for k, v in official.items() if not k.startswith("simfp_2")}
    with pytest.raises(ValueError, match="simfp_2"):
        weights.init_student(fresh, save(tmp_path, part), "")


def test_converted_encoder_starts_a_student_as_the_file_it_came_from(
    tmp_path, fresh, official, caplog
):
    """A learned position table of 6 x 6 patches: resized to the student's 4 x 4, and said so."""
    table = np.random.default_rng(0).normal(size=(1, 37, 48)).astype(np.float32)
    vit = {k: v for k, v in official.items() if not k.startswith(("simfp", "decoder"))}
    theirs = save(tmp_path, {**vit, "pos_embed": table})
    ours = tmp_path / "ours.safetensors"
    about = {"kind": "encoder", "arch": "48,3,3", "licence": "free"}
    storage.write(ours, torch_names.encoder_from_torch(source.read(theirs)[0]), about)
    got, facts = weights.init_student(fresh, str(ours), "")
    want, _ = weights.init_student(fresh, theirs, "")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(
        got["positions"]["encoder_table"], positions.resize_table(table[0], (4, 4))
    )
    assert (facts["licence"], facts["source"]) == ("free", "ours.safetensors")
    assert facts["position_tables_replaced"] == ["encoder_table"]
    assert "positions/encoder_table is of another image size: it was resized" in caplog.text


# --- the embedded teacher


@pytest.mark.parametrize(
    ("name", "word"), [("resnet18", "embedded"), ("resnet50_caffe", "imagenet")]
)
def test_words_for_weights_that_do_not_exist_list_the_architectures(name, word):
    with pytest.raises(ValueError, match=rf"{word}.*exists for teacher.name in .*not '{name}'"):
        weights.load_teacher(name, word)

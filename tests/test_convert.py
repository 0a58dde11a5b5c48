"""Weights leave for PyTorch and come back: bit for bit, or not at all."""

import argparse
import errno
import json
import os
import pathlib
import runpy

import formula
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from PIL import Image

from mmrjax import convert, methods, weights
from mmrjax.data import epochs, geometry
from mmrjax.methods import base
from mmrjax.models import backbones, mae, positions
from mmrjax.runs import restore
from mmrjax.runtime import checkpoint
from mmrjax.runtime import config as config_lib
from mmrjax.train import step as step_lib
from mmrjax.weights import layouts, mae_names, source, storage, teachers, torch_names

ARCH = "48,3,3"  # of the golden student
SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"


def run(verb, **flags) -> int:
    return convert.main([verb, *(f"--{name}={value}" for name, value in flags.items())])


def assert_same(got: dict, want: dict) -> None:
    """Same names, shapes and bits."""
    got, want = (
        {k: np.asarray(v) for k, v in layouts.flatten(tree).items()} for tree in (got, want)
    )
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        assert got[name].tobytes() == value.tobytes(), name


@pytest.fixture(scope="module")
def golden_student(golden_dir):
    return golden_dir / "student" / "state_img64.safetensors"


@pytest.fixture(scope="module")
def vit(golden_student):
    """The names of a timm ViT: the encoder of the golden student."""
    return torch_names.encoder_part(
        {k: v for k, v in source.read(golden_student)[0].items() if "simfp" not in k}
    )


# --- PyTorch files


def test_a_student_comes_in_and_leaves_bit_for_bit(golden_student, tmp_path, capsys):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert run("from-torch", kind="mmr", arch=ARCH, input=golden_student, output=ours) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("used    70: ")
    names = lines[0].removeprefix("used    70: ").split(", ")
    assert {"cls_token", "blocks.*.attn.qkv.weight", "simfp_2.5.norm.bias"} <= {*names}
    assert len(names) == 70 - 2 * 12  # three blocks under the names of one
    assert lines[1:3] == ["missing none", "unused  none"]
    assert lines[-1] == f"wrote {ours}"
    assert run("to-torch", kind="mmr", input=ours, output=theirs) == 0
    assert_same(safetensors.numpy.load_file(theirs), safetensors.numpy.load_file(golden_student))
    variables, facts = storage.read(ours)
    assert_same(variables, torch_names.student_from_torch(source.read(golden_student)[0]))
    assert (facts["kind"], facts["arch"]) == ("student", ARCH)
    assert facts["converted_from_sha256"] == source.sha256(golden_student)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.safetensors", "theirs.safetensors"]


@pytest.mark.torch
def test_a_student_leaves_as_a_pth_file_too(golden_student, tmp_path):
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    run("from-torch", kind="mmr", arch=ARCH, input=golden_student, output=ours)
    assert run("to-torch", kind="mmr", input=ours, output=theirs) == 0
    state = torch.load(theirs, weights_only=True)
    assert all(torch.is_tensor(value) for value in state.values())
    assert_same(source.read(theirs)[0], source.read(golden_student)[0])
    again = tmp_path / "again.safetensors"
    assert run("from-torch", kind="mmr", arch=ARCH, input=theirs, output=again) == 0
    assert_same(storage.read(again)[0], storage.read(ours)[0])


@pytest.mark.torch
def test_of_a_mae_checkpoint_the_encoder_is_taken(vit, tmp_path, capsys):
    """With what MAE's training script puts beside the weights, and in its wrapper."""
    torch = pytest.importorskip("torch", reason="the torch extra is not installed")
    decoder = {"mask_token": np.ones((1, 1, 8)), "decoder_blocks.0.norm1.bias": np.ones(8)}
    tensors = {k: torch.tensor(v) for k, v in {**vit, **decoder}.items()}
    torch.save({"model": tensors, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "mae.pth")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    assert run("from-torch", kind="mae", arch=ARCH, input=tmp_path / "mae.pth", output=ours) == 0
    out = capsys.readouterr().out
    assert f"used    {len(vit)}: " in out
    assert "unused  2: mask_token, decoder_blocks.*.norm1.bias" in out
    assert "licence CC BY-NC 4.0" in out
    assert source.header(ours)["licence"] == source.MAE_LICENCE
    assert run("to-torch", kind="mae", arch=ARCH, input=ours, output=theirs) == 0
    assert torch.load(theirs, weights_only=True).keys() == {"model"}  # where MAE's code looks
    assert_same(source.read(theirs)[0], vit)


@pytest.fixture(scope="module")
def whole(golden_dir):
    """The state dict of a small masked autoencoder with MAE's names."""
    keys = json.loads((golden_dir / "mae" / "keys.json").read_text())
    state = {k.removeprefix("mae."): formula.formula_weights(k, s) for k, s in keys.items()}
    state["pos_embed"] = positions.sincos_2d(96, (14, 14))[None]
    state["decoder_pos_embed"] = positions.sincos_2d(64, (14, 14))[None]
    return state


def test_a_masked_autoencoder_comes_in_with_its_decoder_and_leaves_bit_for_bit(
    whole, tmp_path, capsys
):
    theirs, ours = tmp_path / "mae_visualize.safetensors", tmp_path / "ours.safetensors"
    safetensors.numpy.save_file(whole, theirs)
    assert run("from-torch", kind="mae_whole", arch="96,3,3", input=theirs, output=ours) == 0
    assert f"used    {len(whole)}" in capsys.readouterr().out
    again, alone = tmp_path / "again.safetensors", tmp_path / "alone.safetensors"
    assert run("to-torch", kind="mae_whole", input=ours, output=again) == 0
    assert_same(safetensors.numpy.load_file(again), whole)
    assert run("to-torch", kind="mae", input=ours, output=alone) == 0
    assert_same(safetensors.numpy.load_file(alone), torch_names.encoder_part(whole))
    for path in (theirs, ours):  # both are values of --config.mala.init
        model = mae.MaskedAutoencoder((14, 14), 96, 3, 3, 64, 2, 4)
        drawn = layouts.hollow(model.init, jnp.zeros((1, 224, 224, 3)))
        got, facts = weights.init_autoencoder(drawn, str(path), "", (14, 14), "mala")
        assert_same(mae_names.to_torch(got), whole)
        assert facts["decoder"]
        assert facts["mae"]


def test_an_encoder_alone_is_no_masked_autoencoder(vit, tmp_path, capsys):
    path, output = tmp_path / "vit.safetensors", tmp_path / "out.safetensors"
    safetensors.numpy.save_file(vit, path)
    assert run("from-torch", kind="mae_whole", arch=ARCH, input=path, output=output) == 1
    assert "there is no decoder: decoder_embed.weight is missing" in capsys.readouterr().err
    assert not output.exists()


def test_the_autoencoder_of_a_run_leaves_under_maes_names(tiny_config, tmp_path, capsys):
    folder = tmp_path / "mala" / "parts" / "seed7"
    folder.mkdir(parents=True)
    config = tiny_config
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "data_digest": "0"}))
    method = methods.create("mala", config)
    shapes = layouts.hollow(lambda key: method.init(key, {})[0])
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), shapes)
    stage = base.Stage(
        "localise",
        1,
        epochs.Plan(2),
        optax.sgd(0.1),
        trained=lambda path: method.is_trained("localise", path),
    )
    with checkpoint.Checkpoints(folder / "checkpoints" / "localise") as checkpoints:
        state = step_lib.create(jax.tree.map(jnp.asarray, variables), stage)
        checkpoints.save(8, step_lib.to_tree(state))
    output = tmp_path / "out.safetensors"
    assert run("to-torch", kind="mae_whole", input=folder, output=output) == 0
    assert "arch    24,2,3" in capsys.readouterr().out
    state, facts = safetensors.numpy.load_file(output), source.header(output)
    assert facts["decoder_heads"] == "2"
    params = variables["params"]["autoencoder"]
    np.testing.assert_array_equal(state["mask_token"], params["mask_token"])
    kernel = params["decoder"]["pixels"]["kernel"]
    np.testing.assert_array_equal(state["decoder_pred.weight"], kernel.T)


def test_of_a_timm_checkpoint_the_encoder_is_taken(vit, tmp_path, capsys):
    """With a learned position table of its own size, and a head."""
    table = np.random.default_rng(0).normal(size=(1, 26, 48)).astype(np.float32)
    state = {**vit, "pos_embed": table}
    head = {"head.weight": np.ones((5, 48), np.float32), "head.bias": np.ones(5, np.float32)}
    safetensors.numpy.save_file({**state, **head}, tmp_path / "timm.safetensors")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    flags = {"kind": "timm", "arch": ARCH}
    assert run("from-torch", **flags, input=tmp_path / "timm.safetensors", output=ours) == 0
    out = capsys.readouterr().out
    unused = next(line for line in out.splitlines() if line.startswith("unused"))
    assert set(unused.removeprefix("unused  2: ").split(", ")) == set(head)
    assert "licence Apache-2.0" in out
    assert run("to-torch", **flags, input=ours, output=theirs) == 0
    assert_same(safetensors.numpy.load_file(theirs), state)


@pytest.mark.parametrize("sign", ["mask_token", "fixed table"])
def test_a_mae_checkpoint_is_not_taken_for_one_of_timm(vit, sign, tmp_path, capsys):
    """It would be called Apache-2.0."""
    extra = {"mask_token": np.ones((1, 1, 8), np.float32)}
    if sign == "fixed table":
        extra = {"pos_embed": positions.sincos_2d(48, (14, 14))[None]}
    safetensors.numpy.save_file({**vit, **extra}, tmp_path / "mae.safetensors")
    flags = {"arch": ARCH, "input": tmp_path / "mae.safetensors"}
    ours = tmp_path / "ours.safetensors"
    assert run("from-torch", kind="timm", **flags, output=ours) == 1
    assert "CC BY-NC 4.0 (non-commercial): use --kind=mae" in capsys.readouterr().err
    assert run("from-torch", kind="mae", **flags, output=ours) == 0


def test_a_teacher_comes_in_and_leaves_bit_for_bit(tmp_path):
    _, variables, _ = weights.load_teacher("resnet18", "random", seed=5)
    state = teachers.to_torch(variables, backbones.architecture("resnet18"))
    rng = np.random.default_rng(0)
    unfolded = {
        key: rng.uniform(0.5, 2, value.shape).astype(np.float32) if value.ndim == 1 else value
        for key, value in state.items()
    }
    unfolded |= {"fc.weight": np.ones((2, 2)), "bn1.num_batches_tracked": np.array(3)}
    names = [tmp_path / f"{name}.safetensors" for name in ("input", "ours", "theirs", "again")]
    safetensors.numpy.save_file(unfolded, names[0])
    flags = {"kind": "teacher", "arch": "resnet18"}
    assert run("from-torch", **flags, input=names[0], output=names[1]) == 0
    assert run("to-torch", **flags, input=names[1], output=names[2]) == 0
    assert run("from-torch", **flags, input=names[2], output=names[3]) == 0
    want = teachers.from_torch(unfolded, backbones.architecture("resnet18"))
    for path in names:  # every one is a value of --config.teacher.weights
        _, got, facts = weights.load_teacher("resnet18", str(path))
        assert_same(got, want)
        assert facts["random"] is False
        assert facts["sha256"] == source.sha256(path)


# --- runs


RUNS = {
    "square, learned table": {"student.layers": (2, 3)},
    "oblong": {
        "student.layers": (1, 2, 3),
        "data.image_size": (48, 80),
        "data.resize": (61, 83),
        "data.interpolation": "bicubic",
        "teacher.seed": 3,
    },
}


@pytest.fixture(scope="module", params=RUNS)
def trained(request, tiny_config, tmp_path_factory):
    """(folder, method, variables) of a run as the program leaves it; its weights are drawn."""
    folder = tmp_path_factory.mktemp("work") / "mmr" / "parts" / "seed7"
    folder.mkdir(parents=True)
    config = tiny_config.copy_and_resolve_references()
    config.update_from_flattened_dict(RUNS[request.param])
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "data_digest": "0"}))
    method = methods.create("mmr", config)
    grid = tuple(side // 16 for side in config.data.image_size)
    shapes = layouts.hollow(method.student.init, jnp.zeros((1, *config.data.image_size, 3)))
    rng = np.random.default_rng(0)
    drawn = {
        name: (rng.normal(0, 0.1, leaf.shape) + name.endswith("scale")).astype(np.float32)
        for name, leaf in layouts.flatten(shapes).items()
    }
    drawn["positions/decoder_table"] = positions.sincos_2d(24, grid)
    if grid[0] != grid[1]:
        fixed = positions.sincos_2d(24, (14, 14))
        drawn["positions/encoder_table"] = positions.resize_table(fixed, grid)
    variables = layouts.unflatten(drawn)
    stage = base.Stage("train", 1, epochs.Plan(2), optax.sgd(0.1))
    with checkpoint.Checkpoints(folder / "checkpoints" / "train") as checkpoints:
        state = step_lib.create(jax.tree.map(jnp.asarray, variables), stage)
        checkpoints.save(8, step_lib.to_tree(state))
    return folder, method, variables


def test_a_run_leaves_bit_for_bit_and_is_not_touched(trained, tmp_path, capsys):
    folder, method, variables = trained
    before = {p: p.stat().st_mtime_ns for p in folder.parent.parent.rglob("*")}
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    assert run("to-torch", kind="mmr", input=folder, output=theirs) == 0
    out = capsys.readouterr().out
    assert "arch    24,2,3\nstep    8\n" in out
    assert {p: p.stat().st_mtime_ns for p in folder.parent.parent.rglob("*")} == before
    assert run("from-torch", kind="mmr", arch="24,2,3", input=theirs, output=ours) == 0
    fresh = jax.tree.map(np.zeros_like, variables) | {"positions": variables["positions"]}
    grid = tuple(side // 16 for side in method.config.data.image_size)
    for path in (theirs, ours):  # both are values of --config.student.init
        got, facts = weights.init_student(fresh, str(path), "", grid)
        assert_same(got, variables)
        assert facts["sha256"] == source.sha256(path)
    again = tmp_path / "again.safetensors"
    assert run("to-torch", kind="mmr", input=ours, output=again) == 0
    assert_same(safetensors.numpy.load_file(again), safetensors.numpy.load_file(theirs))
    assert source.header(again)["resize"] == source.header(theirs)["resize"]


@pytest.mark.torch
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_an_image_gets_the_same_map_in_torch(trained, suffix, tmp_path, monkeypatch, capsys):
    """Heads, sides and resize are in no tensor: both formats carry them beside the tensors."""
    pytest.importorskip("torch", reason="the torch extra is not installed")
    folder, method, variables = trained
    pixels = np.random.default_rng(1).integers(0, 256, (9, 13, 3), np.uint8)
    image = tmp_path / "part.png"
    Image.fromarray(pixels).resize((130, 90), Image.Resampling.BICUBIC).save(image)
    for kind, name in (("mmr", "student"), ("teacher", "teacher")):
        output = tmp_path / f"{name}.{suffix}"
        assert run("to-torch", kind=kind, input=folder, output=output) == 0
    names = (f"student.{suffix}", f"teacher.{suffix}", "map.npy")
    files = [str(tmp_path / name) for name in names]
    capsys.readouterr()
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("sys.argv", ["x", *files[:2], "resnet18", str(image), files[2]])
    runpy.run_path(str(SCRIPTS / "score_in_torch.py"), run_name="__main__")
    got = np.load(files[2])

    view = geometry.View.of(method.config, evaluation=True)
    seen = geometry.view_image(
        np.asarray(Image.open(image)), view.resize, view.size, view.interpolation
    )
    want = jax.jit(method.predict)(variables, method.load_frozen()[0], seen[None] / 255.0)
    assert got.shape == view.size
    assert np.ptp(got) > 0.01
    np.testing.assert_allclose(got, want["map"][0], rtol=0, atol=2e-5)
    score = float(capsys.readouterr().out.split()[-1])
    assert score == pytest.approx(float(method.score(want["map"])[0]), abs=2e-5)


@pytest.mark.torch
def test_the_torch_example_says_how_it_is_called(monkeypatch):
    pytest.importorskip("torch", reason="the torch extra is not installed")
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr("sys.argv", ["x", "student.safetensors"])
    with pytest.raises(SystemExit, match="STUDENT TEACHER ARCH IMAGE"):
        runpy.run_path(str(SCRIPTS / "score_in_torch.py"), run_name="__main__")


def test_the_encoder_of_a_run_leaves_alone(trained, tmp_path):
    folder, _, variables = trained
    output = tmp_path / "vit.safetensors"
    assert run("to-torch", kind="timm", input=folder, output=output) == 0
    state = safetensors.numpy.load_file(output)
    assert not [key for key in state if "decoder" in key or "simfp" in key]
    assert source.header(output)["kind"] == "encoder"
    ours = tmp_path / "ours.safetensors"  # with the fixed table of a student from scratch, perhaps
    assert run("from-torch", kind="timm", input=output, output=ours) == 0
    assert source.header(ours)["licence"] == source.LOCAL
    assert_same(
        torch_names.encoder_from_torch(state)["params"],
        {k: variables["params"][k] for k in ("cls_token", "patch_kernel", "patch_bias", "encoder")},
    )


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("pth", marks=pytest.mark.torch)])
def test_a_random_teacher_is_still_called_random_after_it_left(trained, suffix, tmp_path):
    if suffix == "pth":
        pytest.importorskip("torch", reason="the torch extra is not installed")
    folder, method, _ = trained
    theirs, ours = tmp_path / f"theirs.{suffix}", tmp_path / "ours.safetensors"
    assert run("to-torch", kind="teacher", input=folder, output=theirs) == 0
    assert run("from-torch", kind="teacher", input=theirs, output=ours) == 0
    for path in (theirs, ours):
        _, variables, facts = weights.load_teacher("resnet18", str(path))
        assert facts["random"] is True
        assert_same(variables, method.load_frozen()[0]["teacher"])


def test_a_teacher_that_changed_since_the_training_is_refused(trained, tmp_path):
    folder, method, _ = trained
    config = restore.read_config(folder)
    assert config_lib.flatten(config) == config_lib.flatten(method.config)
    (tmp_path / "results.json").write_text('{"facts": {"teacher": {"sha256": "0123456789"}}}')
    with pytest.raises(ValueError, match="trained with teacher weights of sha256 01234567"):
        restore.teacher(config, tmp_path)


@pytest.mark.parametrize("init", ["mae", "scratch", "ours.safetensors", "gone.safetensors"])
def test_the_licence_of_the_start_is_known_before_the_training_has_results(
    init, trained, vit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    facts = {"kind": "encoder", "arch": ARCH, "licence": "mine"}
    storage.write(pathlib.Path("ours.safetensors"), torch_names.encoder_from_torch(vit), facts)
    stored = json.loads((trained[0] / "config.json").read_text())
    stored["student"]["init"] = init
    (tmp_path / "config.json").write_text(json.dumps(stored))
    (tmp_path / "checkpoints").symlink_to(trained[0] / "checkpoints")
    assert run("to-torch", kind="mmr", input=tmp_path, output="theirs.safetensors") == 0
    wanted = {
        "mae": source.MAE_LICENCE,
        "scratch": None,
        "ours.safetensors": "mine",
        "gone.safetensors": source.LOCAL,
    }
    written = source.header(tmp_path / "theirs.safetensors")
    assert written.get("licence") == wanted[init]


def test_fields_younger_than_a_run_have_their_defaults(trained, tmp_path):
    stored = json.loads((trained[0] / "config.json").read_text())
    del stored["student"]["mask_form"], stored["patchcore"]
    (tmp_path / "config.json").write_text(json.dumps({**stored, "gone": {"field": 1}}))
    config = restore.read_config(tmp_path)
    assert config.student.mask_form == "drop"
    assert config.student.width == 24


# --- what is refused


@pytest.fixture(scope="module")
def inputs(golden_student, vit, golden_dir, tmp_path_factory) -> pathlib.Path:
    """A folder of files that do not fit, or are no files at all."""
    folder = tmp_path_factory.mktemp("inputs")
    student, teacher = folder / "student.safetensors", folder / "teacher.safetensors"
    student.write_bytes(golden_student.read_bytes())
    (folder / "short.safetensors").write_bytes(golden_student.read_bytes()[:-100])
    (folder / "page.pth").write_bytes(b"<html>404 not found</html>")
    reduced = golden_dir / "teacher" / "state_reduced_resnet18.safetensors"
    teacher.write_bytes(reduced.read_bytes())
    safetensors.numpy.save_file(vit, folder / "vit.safetensors")
    wide = {**vit, "norm.bias": np.zeros(96, np.float32)}
    safetensors.numpy.save_file(wide, folder / "wide.safetensors")
    storage.write(
        folder / "ours.safetensors",
        torch_names.encoder_from_torch(vit),
        {"kind": "encoder", "arch": ARCH},
    )
    hostile = {"a": np.ones(2), "a/b": np.ones(2)}
    facts = {"format": "mmrjax", "kind": "student", "arch": ARCH}
    safetensors.numpy.save_file(hostile, folder / "hostile.safetensors", metadata=facts)
    about = {"kind": "student", "arch": ARCH}
    storage.write_torch(folder / "left.safetensors", source.read(golden_student)[0], about)
    odd = {"params": np.ones(2), "positions": np.ones(2)}
    safetensors.numpy.save_file(odd, folder / "odd.safetensors", metadata=facts)
    cut = torch_names.encoder_from_torch(vit)
    cut["params"]["patch_bias"] = cut["params"]["patch_bias"][:40]
    storage.write(folder / "cut.safetensors", cut, {"kind": "encoder", "arch": ARCH})
    storage.write(folder / "nameless.safetensors", cut, {"kind": "encoder"})
    (folder / "work" / "patchcore" / "parts" / "seed1").mkdir(parents=True)
    (folder / "work" / "patchcore" / "parts" / "seed1" / "config.json").write_text("{}")
    return folder


# {case: (verb, kind, arch, input, what the message says)}
REFUSED = {
    "no file": ("from-torch", "mmr", ARCH, "none.pth", "no weights file at"),
    "truncated": ("from-torch", "mmr", ARCH, "short.safetensors", "is not a whole .safetensors"),
    "other depth": ("from-torch", "mmr", "48,4,3", "student.safetensors", "missing: blocks.3."),
    "other width": (
        "from-torch", "mae", "96,3,3", "vit.safetensors",
        "cls_token: given (1, 1, 48) expected (1, 1, 96)",
    ),
    "one wrong tensor": (
        "from-torch", "timm", ARCH, "wide.safetensors",
        "1 tensors of another shape: norm.bias: given (96,) expected (48,)",
    ),
    "encoder for student": ("from-torch", "mmr", ARCH, "vit.safetensors", "decoder_FPN_mask_token"),
    "student for encoder": (
        "from-torch", "mae", ARCH, "student.safetensors", "unexpected: simfp_2.0.bias",
    ),
    "student for teacher": ("from-torch", "teacher", "resnet18", "student.safetensors", "conv1"),
    "reduced teacher": (
        "from-torch", "teacher", "resnet18", "teacher.safetensors",
        "conv1.weight: given (8, 3, 7, 7) expected (64, 3, 7, 7)",
    ),
    "other teacher": (
        "from-torch", "teacher", "resnet50", "teacher.safetensors", "layer1.0.conv3.weight",
    ),
    "unknown teacher": ("from-torch", "teacher", "vgg", "teacher.safetensors", "available: deit"),
    "unknown size": ("from-torch", "mae", "huge", "vit.safetensors", "tiny, small, base, large or"),
    "bad size": ("from-torch", "mae", "48,0,3", "vit.safetensors", "or WIDTH,DEPTH,HEADS"),
    "no size": ("from-torch", "mae", "", "vit.safetensors", "or WIDTH,DEPTH,HEADS"),
    "heads": ("from-torch", "mae", "48,3,5", "vit.safetensors", "divisible by heads=5"),
    "other heads than it says": (
        "from-torch", "mmr", "48,3,4", "left.safetensors", "architecture 48,3,3, not 48,3,4",
    ),
    "other kind than it says": (
        "from-torch", "teacher", "resnet18", "left.safetensors", "holds weights of kind student",
    ),
    "folder": ("from-torch", "mmr", ARCH, "work", "is a folder; from-torch takes a file"),
    "ours already": ("from-torch", "mae", ARCH, "ours.safetensors", "in our format already"),
    "theirs already": ("to-torch", "mmr", "", "student.safetensors", "not a weights file of"),
    "no student in it": ("to-torch", "mmr", "", "ours.safetensors", "weights of kind encoder"),
    "no teacher in it": ("to-torch", "teacher", "", "ours.safetensors", "weights of kind encoder"),
    "not this size": ("to-torch", "mae", "base", "ours.safetensors", "architecture 48,3,3, not b"),
    "tensor and group": ("to-torch", "mmr", "", "hostile.safetensors", "is damaged: 'a' is"),
    "nothing in it": ("to-torch", "mmr", "", "odd.safetensors", "variables missing: params/cls"),
    "cut off": ("to-torch", "mae", "", "cut.safetensors", "given (40,) expected (48,)"),
    "no arch in it": ("to-torch", "mae", "", "nameless.safetensors", "not a weights file of"),
    "no run": ("to-torch", "mmr", "", "work", "no run folder"),
    "no trained student": ("to-torch", "mmr", "", "work/patchcore/parts/seed1", "no checkpoints"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_gives_one_line_and_no_file(case, inputs, tmp_path, capsys):
    verb, kind, arch, name, expected = REFUSED[case]
    output = tmp_path / "new" / "x.safetensors"
    status = run(verb, kind=kind, arch=arch, input=inputs / name, output=output)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert (status, len(lines), captured.out) == (1, 1, "")
    assert expected in lines[0]
    assert lines[0].endswith("nothing was written")
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_left_as_it_is(golden_student, tmp_path, capsys):
    output = tmp_path / "mine.safetensors"
    output.write_bytes(b"precious")
    assert run("from-torch", kind="mmr", arch=ARCH, input=golden_student, output=output) == 1
    assert "mine.safetensors exists; choose another name" in capsys.readouterr().err
    assert output.read_bytes() == b"precious"


def test_a_file_of_mmrjax_says_its_architecture_and_home_is_home(inputs, tmp_path, monkeypatch):
    """Shells do not expand the ~ in --output=~/x."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "in.safetensors").write_bytes((inputs / "left.safetensors").read_bytes())
    assert run("from-torch", kind="mmr", input="~/in.safetensors", output="~/out.safetensors") == 0
    assert source.header(tmp_path / "out.safetensors")["arch"] == ARCH


@pytest.mark.parametrize(("verb", "name"), [("from-torch", "x.pth"), ("to-torch", "x.npz")])
def test_an_output_of_an_unknown_format_is_refused(verb, name, inputs, tmp_path, capsys):
    given = {"from-torch": "vit.safetensors", "to-torch": "ours.safetensors"}[verb]
    flags = {"kind": "mae", "arch": ARCH, "input": inputs / given, "output": tmp_path / name}
    assert run(verb, **flags) == 1
    assert ".safetensors" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(golden_student, tmp_path, monkeypatch, capsys):
    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    flags = {"kind": "mmr", "arch": ARCH, "input": golden_student}
    assert run("from-torch", **flags, output=tmp_path / "x.safetensors") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_student_whose_heads_are_limited_is_not_converted(tiny_config, tmp_path, monkeypatch):
    """In plain PyTorch the same weights would give another map."""
    monkeypatch.setattr(restore, "read_config", lambda folder: tiny_config)
    monkeypatch.setattr(restore, "student", lambda *_: ({"params": {}, "attention": {}}, 3))
    with pytest.raises(ValueError, match=r"see a part of the image each \(mmr_plus\.hybrid\)"):
        convert.to_torch("mmr", "", tmp_path, tmp_path / "student.safetensors")

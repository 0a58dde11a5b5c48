"""Configurations: every file builds, and wrong input is answered with what to type instead."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
from ml_collections import ConfigDict

import configs
from configs import aebad_ablation, common, tile_ablation
from mmrjax import methods
from mmrjax.runtime import config as config_lib

FOLDER = pathlib.Path(configs.__file__).parent
NAMES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "common"))


def docstring(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text().split('"""')[1]


def documented() -> list[str]:
    """Every configs/<name>.py[:argument] that a docstring mentions, and each file without one."""
    found = {f"configs/{name}.py" for name in NAMES}
    for name in NAMES:
        for argument in re.findall(rf"\b{name}\.py:(\w+)", docstring(name)):
            found.add(f"configs/{name}.py:{argument}")
    return sorted(found)


def load(*overrides: str, spec: str = "configs/demo.py") -> ConfigDict:
    return config_lib.load(spec, overrides)


# --- the files


def test_arguments_are_found_in_the_docstrings():
    assert {
        "configs/aebad.py:v",
        "configs/magnetic_tile.py:crop",
        "configs/magnetic_tile.py:image_split",
        "configs/mvtec.py:screw",
        *(f"configs/aebad_ablation.py:{name}" for name in aebad_ablation.TABLES),
        *(f"configs/tile_ablation.py:{name}" for name in tile_ablation.TABLES),
    } <= set(documented())


@pytest.mark.parametrize("spec", documented())
def test_every_documented_configuration_builds_and_validates(spec):
    config = load(spec=spec)
    config_lib.validate(config, methods.METHODS)
    assert config.data.name
    assert config.title
    # The same fields everywhere: nothing is added or dropped by a file.
    reference = config_lib.flatten(common.get_config())
    flat = config_lib.flatten(config)
    assert flat.keys() == reference.keys()
    for name, value in flat.items():
        assert type(value) is type(reference[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_docstring_holds_the_command_to_run(name):
    assert f"python -m mmrjax.main --config=configs/{name}.py --workdir=" in docstring(name)
    assert set(re.findall(r"--config=configs/(\w+)\.py", docstring(name))) == {name}
    assert "xpected" in docstring(name) or "expect" in docstring(name)  # the score


@pytest.mark.parametrize("name", NAMES)
def test_overrides_in_docstrings_name_existing_fields(name):
    for field in re.findall(r"--config\.([\w.]+)=", docstring(name)):
        assert field in config_lib.flatten(load(spec=f"configs/{name}.py"))


@pytest.mark.parametrize(
    "spec",
    [
        "configs/aebad.py:x",
        "configs/magnetic_tile.py:random",
        "configs/aebad_ablation.py:depth",
        "configs/tile_ablation.py:layers",
    ],
)
def test_unknown_argument_lists_the_known(spec):
    argument = spec.partition(":")[2]
    with pytest.raises(ValueError, match=rf"\.py:{argument}: known are"):
        load(spec=spec)


@pytest.mark.parametrize("name", ["demo", "folder"])
def test_file_that_takes_no_argument_says_so(name):
    with pytest.raises(ValueError, match=rf"--config=configs/{name}\.py:x: .*takes no argument"):
        load(spec=f"configs/{name}.py:x")


def test_arguments_change_what_they_say():
    assert load(spec="configs/aebad.py").data.categories == ("s",)
    assert load(spec="configs/aebad.py:v").data.categories == ("v",)
    assert load(spec="configs/mvtec.py").data.categories == ()
    assert load(spec="configs/mvtec.py:screw").data.categories == ("screw",)
    assert load(spec="configs/magnetic_tile.py").data.resize == (224, 224)
    assert load(spec="configs/magnetic_tile.py:crop").data.resize == (256, 256)
    assert load(spec="configs/magnetic_tile.py:image_split").data.protocol == "image_split"


def test_defaults_are_those_of_the_official_code():
    config = common.get_config()
    assert config.data.image_size == (224, 224)
    assert config.data.resize == (256, 256)
    assert (config.teacher.name, config.teacher.weights) == ("wide_resnet50_2", "imagenet")
    assert config.student.mask_ratio == 0.4
    assert config.student.layers == (1, 2, 3)
    assert (config.train.epochs, config.train.batch_size) == (200, 16)
    assert config.train.seeds == (54,)
    assert config.train.crop_scale == (0.7, 1.0)
    assert config.train.crop_ratio == (0.75, 4 / 3)
    optim = config.optim
    assert (optim.learning_rate, optim.beta1, optim.beta2) == (1e-3, 0.9, 0.95)
    assert (optim.epsilon, optim.weight_decay) == (1e-8, 0.05)


def test_two_loads_do_not_share_their_values():
    first, second = load(), load()
    first.train.epochs = 3
    assert second.train.epochs == load().train.epochs == 20


# --- looking up files


def test_packaged_file_is_found_from_another_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(spec="configs/demo.py").data.name == "demo_parts"
    assert load(spec="demo.py").data.name == "demo_parts"


def write_config(path: pathlib.Path, body: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(body))
    return path


OWN = """
    from configs import common
    def get_config(title="mine"):
        config = common.get_config()
        config.title = title
        return config
"""


def test_file_in_the_working_directory_comes_first(tmp_path, monkeypatch):
    write_config(tmp_path / "configs/demo.py", OWN)
    monkeypatch.chdir(tmp_path)
    assert load(spec="configs/demo.py").title == "mine"
    assert load(spec="configs/demo.py:theirs").title == "theirs"


def test_file_by_absolute_path(tmp_path):
    path = write_config(tmp_path / "a b" / "own.py", OWN)
    assert load(spec=str(path)).title == "mine"
    assert load("train.epochs=3", spec=f"{path}:x").train.epochs == 3


def test_unknown_file_lists_the_available(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load(spec="configs/tiles.py")
    message = str(caught.value)
    assert "'configs/tiles.py'" in message
    assert "configs/aebad.py, configs/aebad_ablation.py, configs/btad.py" in message
    assert "common" not in message
    assert "__init__" not in message


def test_missing_file_in_another_folder_is_not_replaced_by_a_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"experiments/demo\.py"):
        load(spec="experiments/demo.py")


def test_common_of_a_users_own_configs_folder_does_not_replace_ours(tmp_path):
    write_config(tmp_path / "configs/common.py", "TITLE = 'not the common of mmrjax'")
    code = "from mmrjax.runtime import config; print(config.load('configs/demo.py').data.name)"
    root = str(FOLDER.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "demo_parts\n", done.stderr


def test_file_without_get_config_says_so(tmp_path):
    path = write_config(tmp_path / "empty.py", "x = 1\n")
    with pytest.raises(ValueError, match=r"empty\.py defines no get_config\(\)"):
        load(spec=str(path))


# --- overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=7", 7),
        ("train.epochs=0x10", 16),
        ("optim.learning_rate=2e-4", 2e-4),
        ("optim.learning_rate=1", 1.0),
        ("data.resident_gib=0", 0.0),
        ("eval.save_maps=true", True),
        ("eval.save_maps=False", False),
        ("eval.save_maps=1", True),
        ("eval.save_maps=0", False),
        ("data.raw_dir=~/my data/x=y", "~/my data/x=y"),
        ("data.raw_dir=123", "123"),
        ("data.raw_dir=", ""),
        ("teacher.weights=random", "random"),
        ("title=Mine, and only mine", "Mine, and only mine"),
        ("train.seeds=54,55", (54, 55)),
        ("train.seeds=(54, 55)", (54, 55)),
        ("train.seeds=[54,55,]", (54, 55)),
        ("train.seeds=54", (54,)),
        ("method.names=mmr", ("mmr",)),
        ("method.names=mmr,patchcore", ("mmr", "patchcore")),
        ("method.names=('mmr', \"patchcore\")", ("mmr", "patchcore")),
        ("data.image_size=(224,224)", (224, 224)),
        ("data.image_size=224, 160", (224, 160)),
        ("eval.resize=()", ()),
        ("eval.resize=", ()),
        ("data.categories=bottle", ("bottle",)),
        ("data.categories=01,02", ("01", "02")),
        ("train.crop_scale=0.5,1", (0.5, 1)),
    ],
)
def test_overrides_are_parsed_by_the_type_of_their_field(override, expected):
    name = override.partition("=")[0]
    value = config_lib.flatten(load(override))[name]
    assert value == expected
    assert type(value) is type(expected)


def test_only_the_named_field_changes():
    before, after = (config_lib.flatten(c) for c in (load(), load("student.depth=9")))
    assert {name for name in before if before[name] != after[name]} == {"student.depth"}


def test_the_last_of_two_overrides_counts():
    assert load("train.epochs=3", "train.epochs=4").train.epochs == 4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=many", "int, such as 20"),
        ("train.epochs=1.5", "int, such as 20"),
        ("train.epochs=1e2", "int, such as 20"),
        ("train.epochs=True", "int, such as 20"),
        ("train.epochs=", "int, such as 20"),
        ("train.epochs=(3)(4", "int, such as 20"),
        ("optim.learning_rate=fast", "float, such as 0.001"),
        ("optim.learning_rate=1e-3,1e-4", "float, such as 0.001"),
        ("optim.learning_rate=True", "float, such as 0.001"),
        ("eval.save_maps=yes", "bool, such as False"),
    ],
)
def test_wrong_types_are_refused_with_an_example(override, expected):
    with pytest.raises(ValueError, match=re.escape(f"--config.{override}: expected {expected}")):
        load(override)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.epoch", "train.epochs"),
        ("optim.learning_rat", "optim.learning_rate"),
        ("data.imagesize", "data.image_size"),
        ("epochs", "train.epochs"),  # the group forgotten
        ("model.mask_ratio", "student.mask_ratio"),  # another group
        ("data.batch_size", "train.batch_size"),
        ("data.batch_size", "eval.batch_size"),
        ("some_entirely_different_group.seeds", "train.seeds"),
    ],
)
def test_misspelled_fields_name_the_nearest(wrong, right):
    with pytest.raises(
        ValueError, match=rf"--config\.{wrong}: no such field; did you mean.*{right}"
    ):
        load(f"{wrong}=1")


@pytest.mark.parametrize(
    ("wrong", "listed"),
    [
        ("ckpt.zzzzzzzzz", "ckpt.every_seconds, ckpt.keep"),
        ("zzzzzzzzz", "aminet, calibration, ckpt, data"),
    ],
)
def test_fields_like_no_other_list_the_known(wrong, listed):
    with pytest.raises(ValueError, match=rf"no such field; known: {listed}"):
        load(f"{wrong}=1")


def test_a_whole_group_cannot_be_set():
    with pytest.raises(ValueError, match=r"--config\.train: no such field"):
        load("train=5")


def test_field_without_value_says_how_to_give_one():
    with pytest.raises(
        ValueError, match=r"--config\.train\.epochs: give a value, as in --config\.tr"
    ):
        load("train.epochs")


def test_category_named_with_digits_stays_text():
    assert load("data.categories=123", spec="configs/folder.py").data.categories == ("123",)


# --- validation


@pytest.mark.parametrize(
    "override",
    [
        "data.protocol=random",
        "data.interpolation=nearest",
        "data.feed=disk",
        "train.augment=flip",
        "train.compute_dtype=float16",
        "eval.metrics_mode=official",
        "patchcore.score=max",
        "student.mask_form=pixels",
        "sweep.average=seeds",
        "mmr_plus.heads=nearest",
        "mmr_plus.sampling=sparse",
        "mmr_plus.layers=first_half",
        "mmr_plus.tiny_mode=mean",
        "mmr_plus.labelled_target=paste",
        "mmr_plus.foreground=part",
        "mmr_plus.contrast=infonce",
        "mmr_plus.domain=mmd",
        "mmr_plus.spatial_distribution=centre",
    ],
)
def test_unknown_choices_list_the_known(override):
    with pytest.raises(ValueError, match=rf"--config\.{override}: choose one of \w+, \w+"):
        config_lib.validate(load(override), methods.METHODS)


@pytest.mark.parametrize(
    "field", ["train.epochs", "train.batch_size", "eval.batch_size", "ckpt.keep"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_counts_must_be_positive(field, value):
    with pytest.raises(ValueError, match=rf"--config\.{field}={value}: must be at least 1"):
        config_lib.validate(load(f"{field}={value}"), methods.METHODS)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=224", "expected height,width such as 224,224"),
        ("data.resize=256,256,3", "expected height,width"),
        ("data.resize=256,x", "expected values such as"),
        ("data.resize=256.0,256.0", "expected values such as"),
        ("eval.resize=256", "expected height,width"),
        ("data.resize=200,256", r"smaller than data\.image_size=\(256, 256\)"),
        ("eval.resize=256,223", r"smaller than data\.image_size=\(256, 256\)"),
        ("student.mask_ratio=1", "must lie between 0.0 and 0.99"),
        ("student.mask_ratio=-0.1", "must lie between 0.0 and 0.99"),
        ("student.mask_unit=0", "must lie between 1 and"),
        ("train.seeds=", "give one or more different values"),
        ("train.seeds=a", "expected values such as"),
        ("train.seeds=54,5.5", "expected values such as"),
        ("train.seeds=54,54", "give one or more different values"),
        ("method.names=", "give one or more different values"),
        ("student.layers=1,1", "give one or more different values"),
        ("patchcore.scales=", "give one or more, each larger than the one before"),
        ("patchcore.scales=1,1.0", "give one or more, each larger than the one before"),
        ("patchcore.scales=1,0.5", "give one or more, each larger than the one before"),
        ("patchcore.scales=0.12,1", "leaves .* px, and the teacher needs 32"),
        ("patchcore.scales=0.05,1", "must lie between 0.1 and 8.0"),
        ("train.crop_scale=1,0.7", "expected smallest,largest"),
        ("optim.warmup=50", "must lie between 0.0 and 1.0"),
        ("patchcore.coreset=1.5", "must lie between"),
        ("eval.resize=x", "expected values such as"),
        ("mmr_plus.window=4", "must be odd"),
        ("mmr_plus.defect_folder=nowhere", "nowhere: there is no such folder"),
        ("mmr_plus.defect_folder=pyproject.toml", "there is no such folder"),
        ("mmr_plus.defect_folder=gs://shop/dents", "copy what is in a bucket, or mount it"),
        ("mmr_plus.soft_start=20", "must lie between 0.0 and 0.9"),
        ("mmr_plus.tiny_weight=0.5", "must lie between 1.0 and"),
        ("mmr_plus.ramp=0.5,0.1", "expected smallest,largest"),
        ("mmr_plus.defect_kinds=", "give one or more different values"),
        ("data.image_size=0,0", ""),  # even initialises a student
        ("train.crop_scale=0.7", ""),  # IndexError while tracing
        ("train.crop_ratio=a,b", ""),
        ("optim.drops=x", ""),  # TypeError
        ("train.seeds=-1", ""),  # NumPy refuses it once the teacher is loaded
        ("student.layers=4", ""),  # IndexError
        ("student.layers=0", ""),  # builds a stage of layer 3's width
        ("student.layers=", ""),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_computed(override, message):
    name = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"--config\.{name}=.*{message}"):
        config_lib.validate(load(override), methods.METHODS)


@pytest.mark.parametrize(
    "override",
    [
        "data.image_size=224,160",
        "eval.resize=256,300",
        "student.mask_ratio=0",
        "train.seeds=54,55,56",
        "eval.metrics_mode=mmr",
    ],
)
def test_values_that_work_are_accepted(override):
    config_lib.validate(load(override), methods.METHODS)


# --- flatten


def test_flatten_names_every_field_once_and_sorts_by_name():
    config = ConfigDict({"b": {"d": {"e": None}, "c": (2,)}, "a": 1})
    assert list(config_lib.flatten(config).items()) == [("a", 1), ("b.c", (2,)), ("b.d.e", None)]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1\ndef get_config(:\n", r"line 2: invalid syntax"),
        ("import nothing_there\n", r"line 1: ModuleNotFoundError: No module named 'nothing_there'"),
        ("def get_config():\n    return 1 / 0\n", r"line 2: ZeroDivisionError"),
        ("def get_config():\n    return 5\n", r"get_config\(\) lacks aminet.augment, .*common"),
        ("def get_config():\n    raise ValueError('no blade')\n", r"^no blade$"),
        (
            "from configs import common\ndef get_config():\n    config = common.get_config()\n"
            "    config.patchcore.enlarge = 1.5\n    return config\n",
            r"mine\.py: get_config\(\) sets patchcore\.enlarge, no such field; did you mean",
        ),
    ],
)
def test_a_configuration_file_that_fails_is_named_with_the_line(tmp_path, code, message):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=message) as caught:
        config_lib.load(str(tmp_path / "mine.py"))
    assert "mine.py" in str(caught.value) or "no blade" in code


def test_a_configuration_that_is_no_python_file_is_refused(tmp_path):
    (tmp_path / "mine.bin").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=r"mine\.bin: expected a Python file, ending in \.py"):
        config_lib.load(str(tmp_path / "mine.bin"))


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("demo", "folder", "folder_settings")]
)
def test_published_protocols_train_on_every_good_image(name):
    assert config_lib.load(f"configs/{name}.py").calibration.fraction == 0

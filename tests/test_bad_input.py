"""Bad input at the command line: one line that says what to do, failure, earlier results untouched.

What is wrong with the command line itself is in test_main.py.
"""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile
import zlib

import cv2
import numpy as np
import pytest

from mmrjax import main

SEED_2 = "--config.train.seeds=2"  # a run of its own: nothing is trained in it yet


@pytest.fixture(scope="module")
def finished(tiny_raw, tiny_fields, tmp_path_factory):
    """(home, arguments) of a finished PatchCore run; its files must outlive every bad command."""
    home = tmp_path_factory.mktemp("finished")
    fields = [*tiny_fields(tiny_raw, home / "records"), "--config.method.names=patchcore"]
    args = ["--config=configs/folder.py", f"--workdir={home / 'run'}", *fields]
    assert main.main([*args, "--config.train.seeds=1"]) == 0
    return home, [*args, "--config.train.seeds=1"]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Of every file, but of the run that the bad commands begin and never train."""
    files = (p for p in folder.rglob("*") if p.is_file() and "seed2" not in p.parts)
    return {str(p): p.read_bytes() for p in files}


@pytest.fixture
def refused(finished, capfd):
    """Runs a command that must fail, and returns its one line."""
    home, args = finished

    def run(*extra: str) -> str:
        before = contents(home)
        capfd.readouterr()
        assert main.main([*args, *extra]) == 1
        output = capfd.readouterr()
        assert output.out == ""
        assert "Traceback" not in output.err
        (line,) = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert output.err.splitlines()[-1] == line
        assert contents(home).items() >= before.items()  # a lock file may come
        return line

    return run


# --- folders and images


def folder_of(tmp: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path:
    rng = np.random.default_rng(0)
    for name in names:
        (tmp / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp / "raw" / name), rng.integers(0, 256, (64, 64, 3), np.uint8))
    return tmp / "raw"


def missing_folder(tmp):
    return tmp / "nowhere"


def empty_folder(tmp):
    (tmp / "raw").mkdir()
    return tmp / "raw"


def a_file(tmp):
    (tmp / "raw.zip").write_bytes(b"PK")
    return tmp / "raw.zip"


def only_defective(tmp):
    return folder_of(tmp, ("scratch/0.png", "dent/0.png"))


def absurd_images(tmp):
    """PNGs of kilobytes that claim to be 60000 x 60000 pixels; one alone would be left out."""
    folder = folder_of(tmp, ("good/0.png", "good/1.png", "good/2.png"))
    for path in sorted(folder.rglob("*.png")):
        data = bytearray(path.read_bytes())
        data[16:24] = (60000).to_bytes(4, "big") * 2  # width and height in the IHDR chunk
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path.write_bytes(data)
    return folder


FOLDERS = {
    missing_folder: ("does not exist", "Give a folder that holds"),
    empty_folder: ("it holds: nothing", "Give a folder that holds"),
    a_file: ("is a file; unpack it",),
    only_defective: ("cannot tell which images are good", "Put good images into a folder"),
    absurd_images: ("no picture of", "good/", "MMRJAX_MAX_MEGAPIXELS="),
}


@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_unusable_raw_data_are_named_with_what_to_do(refused, tmp_path, make):
    line = refused(f"--config.data.raw_dir={make(tmp_path)}")
    assert all(part in line for part in FOLDERS[make]), line
    assert str(tmp_path) in line or "good/" in line


ONE_SIDED = {
    "no defective image": (("good/0.png", "good/1.png", "good/2.png"), "no anomalous image"),
    "no good test image": (
        ("train/good/0.png", "train/good/1.png", "test/hole/0.png"),
        "no good image",
    ),
}


@pytest.mark.parametrize("case", ONE_SIDED)
def test_a_test_set_of_one_class_has_scores_and_undefined_metrics(finished, tmp_path, case):
    names, absent = ONE_SIDED[case]
    args = [a for a in finished[1] if not a.startswith("--workdir")]
    fields = {"data.raw_dir": folder_of(tmp_path, names), "data.data_dir": tmp_path / "records"}
    args += [f"--config.{name}={value}" for name, value in fields.items()]
    assert main.main([*args, f"--workdir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run/patchcore/raw/seed1/results.json").read_text())
    values = results["metrics"]["folder/raw"]["all"]
    assert values["image_auroc"] is None
    assert absent in values["reasons"]["image_auroc"]
    page = (tmp_path / "run/report.html").read_text()
    assert values["reasons"]["image_auroc"] in page
    assert (tmp_path / "run/patchcore/raw/seed1/scores.csv").read_text().count("\n") == 2


# --- devices


def test_an_indivisible_batch_names_both_numbers_and_the_nearest_valid(refused):
    line = refused(SEED_2, "--config.eval.batch_size=12")
    assert "eval.batch_size=12 must be divisible by 8 devices; try 8 or 16" in line


@pytest.mark.parametrize("platform", ["cuda", "tpu", "abacus"])
def test_a_device_that_is_not_there_is_one_line(platform, tmp_path):
    if platform == "cuda" and shutil.which("nvidia-smi"):
        pytest.skip("a GPU is there")
    command = [sys.executable, "-m", "mmrjax.main", "--config=configs/demo.py"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        env={**os.environ, "JAX_PLATFORMS": platform},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: JAX_PLATFORMS={platform}: no such device can be used here")
    assert "unset it" in line
    assert not (tmp_path / "run").exists()


# --- weights


def of_another_architecture(path):
    np.savez(path, **{"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})


def with_an_absurd_header(path):
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")


def of_petabytes(path):
    header = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (10**15,)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conv1.weight.npy", header.getvalue())


def unpacking_to_gigabytes(path):
    np.savez_compressed(path, a=np.zeros(2**22, np.float32))


WEIGHTS = {
    of_another_architecture: (".npz", "74 tensors missing: bn1.bias, layer1.0.conv1.weight"),
    with_an_absurd_header: (".safetensors", "header too large"),
    of_petabytes: (".npz", "Unable to allocate"),
    unpacking_to_gigabytes: (".npz", "unpacks to 16 MiB"),
}


@pytest.mark.parametrize("make", WEIGHTS, ids=lambda make: make.__name__)
def test_unusable_teacher_weights_are_named_with_the_reason(refused, tmp_path, make):
    suffix, expected = WEIGHTS[make]
    path = tmp_path / f"teacher{suffix}"
    make(path)
    line = refused(SEED_2, f"--config.teacher.weights={path}")
    assert str(path) in line
    assert expected in line


# --- configuration and work directory


def test_a_configuration_that_does_not_exist_lists_those_that_do(refused):
    line = refused("--config=configs/demoo.py")
    assert "configs/demoo.py" in line
    assert "configs/demo.py" in line


def test_a_work_directory_of_another_configuration_names_every_differing_field(refused):
    line = refused("--config.data.image_size=32,32", "--config.patchcore.coreset=0.5")
    assert "data.image_size: was (64, 64), is (32, 32)" in line
    assert "patchcore.coreset: was 0.2, is 0.5" in line
    assert "use another --workdir" in line


def test_a_work_directory_of_other_pictures_is_refused(refused, tmp_path):
    folder = folder_of(tmp_path, ("good/0.png", "good/1.png", "bad/0.png")).rename(
        tmp_path / "parts"
    )
    records = f"--config.data.data_dir={tmp_path / 'records'}"
    line = refused(f"--config.data.raw_dir={folder}", records)
    assert "was trained on other data" in line
    assert "use another --workdir" in line


# --- records


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def with_a_flipped_bit(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("*-train.array_record*", cut_short),
        ("*-train.array_record*", with_a_flipped_bit),
        ("dataset_info.json", cut_short),
    ],
)
def test_damaged_records_are_named_and_built_again_when_deleted(
    refused, finished, tmp_path, file, damage
):
    shutil.copytree(finished[0] / "records", tmp_path / "records")
    path = next((tmp_path / "records").rglob(file))
    path.write_bytes(damage(path.read_bytes()))
    records = f"--config.data.data_dir={tmp_path / 'records'}"
    line = refused(SEED_2, records)
    assert f"the records in {path.parent} are damaged" in line
    assert "delete that folder" in line
    shutil.rmtree(path.parent)
    assert main.main([*finished[1], records]) == 0

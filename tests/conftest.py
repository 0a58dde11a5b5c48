"""Shared fixtures: eight simulated devices, parsed absl flags, the way to the shared data."""

import importlib.util
import os
import pathlib
import threading

import cv2

# Programs here run once or twice on tiny data: compiling them well takes longer than it saves, a
# third of the suite's time. Also of child processes; 0 in the environment tests them as users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# And one command in this process would have all small programs of the later tests kept for nobody.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")

import jax
import numpy as np
import pytest
from absl import flags

from mmrjax import main
from mmrjax.runtime import config as config_lib

# Tests of sharding need several devices. XLA reads the flag as JAX begins, here and not in children
# of this process; jax_num_cpu_devices would look as if devices.show_cores had chosen the number.
jax.config.update("jax_platforms", "cpu")
with pytest.MonkeyPatch.context() as _patch:
    _patch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    jax.devices()
flags.FLAGS.mark_as_parsed()  # Grain reads absl flags

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with golden values, real tiles and a real teacher; absent on a user's machine."""
    path = pathlib.Path(os.environ.get("MMRJAX_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared folder at {path}; set MMRJAX_SHARED to run this test")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    """Values computed once with the official PyTorch code; see tests/golden/README.md."""
    return ROOT / "tests" / "golden"


def pytest_addoption(parser):
    parser.addoption("--differences", action="store_true", help="print what `agree` measured")


def pytest_terminal_summary(terminalreporter, config):
    """The measured differences as rows of the table in docs/parity.md."""
    if config.getoption("--differences"):
        for report in terminalreporter.getreports("passed"):
            for case, atol, difference in (v for k, v in report.user_properties if k == "agree"):
                terminalreporter.write_line(f"| {case} | {atol:.0e} | {difference:.1e} |")


@pytest.fixture
def agree(record_property):
    """Asserts that two trees of arrays are equal within `atol`, and records by how much."""

    def check(case: str, got, want, atol: float) -> None:
        assert jax.tree.structure(got) == jax.tree.structure(want)
        pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
        assert all(np.shape(g) == np.shape(w) for g, w in pairs)
        difference = max(float(np.abs(np.asarray(g) - np.asarray(w)).max()) for g, w in pairs)
        record_property("agree", (case, atol, difference))
        assert difference <= atol, f"{case}: differs by {difference:.1e}, allowed is {atol:.0e}"

    return check


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory) -> pathlib.Path:
    """A folder data set of small pictures: 12 good ones, 4 with a bright square and its mask."""
    folder = tmp_path_factory.mktemp("tiny") / "parts"
    rng = np.random.default_rng(0)
    for kind, count in (("good", 12), ("bad", 4)):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            h, w = 60 + 4 * (i % 3), 72 + 6 * (i % 2)
            ramp = np.linspace(60, 160, w)[None, :, None] + rng.normal(0, 8, (h, w, 3))
            mask = np.zeros((h, w), np.uint8)
            if kind == "bad":
                mask[20:34, 12 * i + 4 : 12 * i + 18] = 255
                ramp[mask > 0] = 250 - ramp[mask > 0]
                cv2.imwrite(str(folder / kind / f"{i:02d}_mask.png"), mask)
            cv2.imwrite(str(folder / kind / f"{i:02d}.png"), np.clip(ramp, 0, 255).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def storage():
    """A server that stands in for Google Cloud Storage; see gcs_server.py."""
    pytest.importorskip("gcsfs", reason="needs gcsfs: pip install '.[gcs]'")
    path = ROOT / "tests" / "gcs_server.py"
    spec = importlib.util.spec_from_file_location("gcs_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def bucket(storage, tmp_path_factory):
    """(address, {name: (bytes, number)}) of an empty bucket; copies lie in a cache of its own."""
    name = f"shop{len(storage.buckets)}"
    storage.buckets[name] = {}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in storage.environment().items():
            patch.setenv(variable, value)
        patch.setenv("MMRJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield f"gs://{name}", storage.buckets[name]


# A model that trains in a second: enough to run the whole program.
TINY_MODEL = (
    "data.image_size=64,64",
    "data.resize=64,64",
    "teacher.name=resnet18",
    "teacher.weights=random",
    "student.size=",
    "student.width=24",
    "student.depth=2",
    "student.heads=3",
    "student.init=scratch",
    "student.layers=2,3",
    "train.batch_size=8",
    "train.epochs=4",
    "eval.batch_size=8",
    "eval.bootstrap=20",
    "report.gallery=3",
    "patchcore.width=32",
    "patchcore.coreset=0.2",
    "patchcore.coreset_of=all",
    "patchcore.projection=16",
    "aminet.width=24",
    "aminet.heads=3",
    "aminet.depth=2",
    "aminet.clusters=3",
    "aminet.epochs=2",
    "mala.size=",
    "mala.width=24",
    "mala.depth=2",
    "mala.heads=3",
    "mala.decoder_width=16",
    "mala.decoder_depth=1",
    "mala.decoder_heads=2",
    "mala.init=scratch",
    "mala.plpm_base=4",
    "mala.epochs=2,2",
    "mala.batch_sizes=8,8",
    "mala.images=8,10",
)


@pytest.fixture(scope="session")
def tiny_fields():
    """(raw_dir, data_dir) -> the overrides of a complete tiny run."""

    def overrides(raw_dir, data_dir) -> list[str]:
        fields = (*TINY_MODEL, f"data.raw_dir={raw_dir}", f"data.data_dir={data_dir}")
        return [f"--config.{field}" for field in fields]

    return overrides


@pytest.fixture(scope="session")
def finished(tiny_raw, tmp_path_factory, tiny_fields):
    """(work directory, arguments) of a run of both methods with two seeds and a threshold."""
    home = tmp_path_factory.mktemp("finished")
    args = [
        "--config=configs/folder.py",
        f"--workdir={home / 'run'}",
        *tiny_fields(tiny_raw, home / "records"),
        "--config.train.seeds=1,2",
        "--config.calibration.way=split",
        "--config.calibration.fraction=0.5",  # five of ten: rates from a sixth on
        "--config.calibration.target_fpr=0.2",
        *(
            ["--config.log.trackers=tensorboard"]
            if importlib.util.find_spec("tensorboardX")
            else []
        ),
    ]
    assert main.main(args) == 0
    return home / "run", args


@pytest.fixture
def tiny_args(tiny_raw, tiny_fields, tmp_path) -> list[str]:
    """Command-line arguments of a complete tiny run; records and work directory in tmp_path."""
    overrides = tiny_fields(tiny_raw, tmp_path / "records")
    return ["--config=configs/folder.py", f"--workdir={tmp_path / 'run'}", *overrides]


@pytest.fixture(scope="session")
def tiny_config():
    """The configuration of the tiny model."""
    return config_lib.load("configs/folder.py", TINY_MODEL)

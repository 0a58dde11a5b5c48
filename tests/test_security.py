"""Nothing from outside is executed, nothing leaves its folder, nothing goes to the network."""

import ast
import csv
import html
import html.parser
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from data_builders import build, common, images
from mmrjax import main
from mmrjax.runtime import checkpoint
from mmrjax.weights import source

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("mmrjax", "data_builders", "configs", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
# Modules that execute what they read, and calls that start programs.
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
DANGEROUS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}


# --- no pickle


def dotted(node: ast.AST) -> str:
    """The name of what is called: np.load, pickle.loads, eval."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""


def wrong_calls(tree: ast.AST) -> list[str]:
    """Calls that execute what they read, or could."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            wrong += [f"import {name}" for name in names if name.split(".")[0] in UNPICKLING]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in DANGEROUS or given.get("shell") == "True":
            wrong.append(name)
        if given.get("allow_pickle", "False") != "False":
            wrong.append(f"{name}(allow_pickle=…)")
        if name.endswith("Image.open") and given.get("formats", "None") == "None":
            wrong.append(f"{name} of any format")  # of PostScript too, which is a program
        if name in ("torch.load", "torch.jit.load") and given.get("weights_only") != "True":
            wrong.append(f"{name} without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
            wrong.append(f"{name} without allow_pickle=False")
    return wrong


# The reader of PyTorch's files: an unpickler that looks no name up (tests/weights).
READER = ROOT / "mmrjax" / "weights" / "torch_format.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_executes_what_it_reads(path):
    allowed = ["import pickle"] if path == READER else []
    assert wrong_calls(ast.parse(path.read_text(encoding="utf-8"))) == allowed


def test_the_reader_of_pytorch_files_uses_its_own_unpickler_alone():
    tree = ast.parse(READER.read_text(encoding="utf-8"))
    used = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} == {
        *("pickle.Unpickler", "pickle.UnpicklingError")
    }
    bases = [
        ast.unparse(node.bases[0])
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.bases
    ]
    assert bases.count("pickle.Unpickler") == 1
    calls = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "pickle.Unpickler" not in calls


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from joblib import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "eval(text)",
        "Image.open(path)",
        "Image.open(path, formats=None)",
    ],
)
def test_the_search_finds_what_it_is_for(text):
    assert wrong_calls(ast.parse(text))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp"])
def test_postscript_named_as_a_picture_starts_no_program(monkeypatch, tmp_path, name):
    def refuse(*args, **kwargs):
        raise AssertionError(f"started: {args}")

    for function in ("run", "call", "check_call", "check_output", "Popen"):
        monkeypatch.setattr(subprocess, function, refuse)
    (tmp_path / name).write_bytes(POSTSCRIPT)
    with pytest.raises(ValueError, match=r"the image is damaged .*no known image format"):
        images.encode_image(tmp_path / name, name)
    with pytest.raises(ValueError, match="the image is damaged"):
        images.read_grey(tmp_path / name)
    assert images.format_of(POSTSCRIPT) == ""


@pytest.fixture
def no_unpickling(monkeypatch):
    """Any way into pickle raises; NumPy and torch included."""
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


def test_checkpoints_and_weights_are_read_without_unpickling(no_unpickling, tmp_path):
    state = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    with checkpoint.Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        assert checkpoints.restore(state)[0] == 1
    arrays = {"conv1.weight": np.ones((2, 3), np.float32)}
    np.savez(tmp_path / "w.npz", **arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    for name in ("w.npz", "w.safetensors"):
        np.testing.assert_array_equal(
            source.read(tmp_path / name)[0]["conv1.weight"], arrays["conv1.weight"]
        )


# --- hostile names


HOSTILE = "<script>alert('x')</script> \"><img src=x onerror=alert(1)>"


class Hostile(common.RecordBuilder):
    """A data set whose every name tries to leave its folder or the page."""

    VERSION = "1.0.0"
    CATEGORIES = ("parts",)
    PROCEDURAL = True
    top = ""  # a folder to which an absolute name points

    def examples(self, raw_dir, category):
        rng = np.random.default_rng(0)
        for i in range(12):
            image = rng.integers(100, 140, (64, 64, 3), np.uint8)
            yield "train", {"id": f"../../up/{i}", "image": image, "label": "good"}
        names = (
            "../../../escaped",
            f"{self.top}/absolute",
            f"a\0b {HOSTILE}",
            "..\\..\\windows",
            "c:x",
        )
        for i, name in enumerate(names):
            for label in common.LABELS:
                image = rng.integers(100, 140, (64, 64, 3), np.uint8)
                mask = np.zeros((64, 64), bool)
                mask[16:32, 16:32] = label == "anomaly"
                image[mask] = 255
                example = {"id": f"{name}/{label}", "image": image, "mask": mask, "label": label}
                defect = f"{name} {HOSTILE}" if label == "anomaly" else "good"
                yield "test", {**example, "defect": defect, "domain": f"{HOSTILE} {i % 2}"}


class Elements(html.parser.HTMLParser):
    """Names and attributes of all elements of a page, and its text."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def hostile(tiny_fields, tmp_path_factory):
    """(folder, work directory in it) of a PatchCore run on the hostile data set."""
    home = tmp_path_factory.mktemp("a") / "b" / "c" / "d"
    home.mkdir(parents=True)
    fields = [*tiny_fields("", home / "records"), "--config.method.names=patchcore"]
    fields += [
        "--config.data.name=hostile",
        f"--config.title={HOSTILE}",
        "--config.report.gallery=12",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(build.BUILDERS, "hostile", __name__)
        patch.setattr(build, "load_builder", lambda name: Hostile)
        patch.setattr(Hostile, "top", str(home.parent.parent.parent))
        assert main.main(["--config=configs/folder.py", f"--workdir={home / 'run'}", *fields]) == 0
    return home, home / "run"


def test_hostile_names_become_harmless_files(hostile):
    home, workdir = hostile
    top = home.parent.parent.parent
    outside = [p for p in top.rglob("*") if p.is_file() and home not in p.parents]
    assert outside == []
    pictures = [p.name for p in (workdir / "patchcore/parts/seed54/maps").iterdir()]
    assert len(pictures) > 12
    assert all(name[:3].isdigit() or name == "gallery.json" for name in pictures), pictures


def test_the_report_shows_hostile_names_as_text(hostile):
    _, workdir = hostile
    page = (workdir / "report.html").read_text(encoding="utf-8")
    found = Elements(page)
    assert "script-src 'sha256-" in page  # ours, which the policy knows by its hash
    assert page.count("<script") == 1
    assert not any(name.startswith("on") for name in found.attributes)
    assert page.count("<img src=x") == 0
    assert html.escape(HOSTILE) in page or HOSTILE in found.text
    assert "<script" not in (workdir / "report.md").read_text(encoding="utf-8")


def test_hostile_names_come_back_from_the_tables_as_they_were(hostile):
    run = hostile[1] / "patchcore/parts/seed54"
    with (run / "scores.csv").open(newline="", encoding="utf-8") as file:
        ids = {row["id"] for row in csv.DictReader(file)}
    assert "../../../escaped/good" in ids
    gallery = json.loads((run / "maps/gallery.json").read_text(encoding="utf-8"))
    assert {item["id"] for item in gallery["items"]} <= ids


# --- no network

WALL = """
import os, socket

def note(what):
    with open(os.environ["ATTEMPTS"], "a") as file:
        file.write(f"{what}\\n")
    raise OSError(f"no network: {what}")

def connect(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        note(address)
    return original(self, address, *rest)

original = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = connect
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, lambda host, *rest, **options: note(host))
"""


@pytest.fixture
def walled_in(tmp_path):
    """Runs Python behind a wall; returns what became of it, and what it tried to reach."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WALL)
    attempts = tmp_path / "attempts"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "ATTEMPTS": str(attempts),
        "MMRJAX_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]),
    }

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess, str]:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, attempts.read_text() if attempts.exists() else ""

    return run


def test_the_wall_stands_and_notes_who_ran_into_it(walled_in):
    done, attempts = walled_in("-c", "import urllib.request as u; u.urlopen('http://192.0.2.1/')")
    assert done.returncode == 1
    assert "192.0.2.1" in attempts
    done, attempts = walled_in("-c", "import socket as s; s.socket().connect(('192.0.2.2', 80))")
    assert "192.0.2.2" in attempts


def test_training_evaluation_and_report_need_no_network(walled_in, tiny_args, tmp_path):
    run = tmp_path / "run"
    args = [*tiny_args, "--config.train.epochs=1", "--config.method.names=mmr"]
    assert walled_in("-m", "mmrjax.main", *args)[0].returncode == 0
    next(run.glob("mmr/*/seed*/results.json")).unlink()
    assert walled_in("-m", "mmrjax.main", *args, "--mode=evaluate")[0].returncode == 0
    done, attempts = walled_in("-m", "mmrjax.report", f"--workdir={run}")
    assert done.returncode == 0
    assert attempts == ""


def test_published_weights_are_fetched_and_without_a_network_one_line_says_how(
    walled_in, tiny_args
):
    pytest.importorskip("torch", reason="the torch extra is not installed")
    done, attempts = walled_in("-m", "mmrjax.main", *tiny_args, "--config.teacher.weights=imagenet")
    assert done.returncode == 1
    assert attempts
    assert all("download.pytorch.org" in line for line in attempts.splitlines())
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: resnet18-f37072fd.pth is not in the cache")
    assert "fetch it where there is a network and put it at" in line

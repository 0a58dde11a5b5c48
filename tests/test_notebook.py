"""scripts/colab.ipynb: clean, installable, and it runs from top to bottom without a network."""

import ast
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "scripts" / "colab.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]

# Small enough for a test: both trainings get these.
SMALL = (
    "data.image_size=64,64 data.resize=64,64 train.epochs=1 student.width=24 student.size= "
    "student.heads=3 student.depth=1 student.layers=2 eval.bootstrap=0 patchcore.layers=2,3 "
    "patchcore.coreset=0.002 patchcore.width=32 patchcore.projection=16"
)


def test_no_output_is_stored_and_every_cell_is_plain_python():
    for cell in CELLS:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    for source in CODE:
        ast.parse(source)


@pytest.fixture
def install(monkeypatch):
    """Runs the first cell where mmrjax is not to be found; what it would have installed."""

    def run(source: str, gpu: bool) -> list[str]:
        called = []
        monkeypatch.setenv("MMRJAX_SOURCE", source)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if gpu else None)
        monkeypatch.setattr(subprocess, "run", lambda words, check: called.extend(words))
        exec(CODE[0], {})
        return called[1:]

    return run


@pytest.mark.parametrize(
    ("source", "gpu", "requirement"),
    [
        ("/content/mmrjax", False, "/content/mmrjax"),
        ("/content/mmrjax-0.1.0-py3-none-any.whl", True,
         "/content/mmrjax-0.1.0-py3-none-any.whl[cuda12]"),
        ("git+https://example.org/mmrjax", True, "mmrjax[cuda12] @ git+https://example.org/mmrjax"),
    ],
)  # fmt: skip
def test_it_installs_from_where_it_is_told(install, source, gpu, requirement):
    assert install(source, gpu) == ["-m", "pip", "install", "--quiet", requirement]


def test_it_says_what_is_missing_where_nothing_is_told(install):
    with pytest.raises(SystemExit, match="write into SOURCE where it comes from"):
        install("", False)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_shows_pictures(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="the extra `notebook` brings nbformat")
    nbclient = pytest.importorskip("nbclient", reason="the extra `notebook` brings nbclient")
    pytest.importorskip("ipykernel", reason="the extra `notebook` brings ipykernel")
    fields = [f"--config.{field}" for field in SMALL.split()]
    fields.append(f"--config.data.data_dir={tmp_path / 'records'}")
    monkeypatch.setenv("MMRJAX_NOTEBOOK_ARGUMENTS", " ".join(fields))
    monkeypatch.setenv("MMRJAX_NOTEBOOK_FOLDER", "")
    monkeypatch.setenv("MMRJAX_SOURCE", "")  # mmrjax is there: nothing is installed
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    resources = {"metadata": {"path": str(tmp_path)}}
    # Raises when a cell does.
    nbclient.NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources=resources
    ).execute()
    shown = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "<img src=" in str(output.get("data", {}).get("text/html"))
    ]
    assert len(shown) > 3  # the two detectors and pictures of several folders
    assert any("<b>good</b>" in html or "<b>anomaly</b>" in html for html in shown)
    for name in ("demo", "mine"):
        assert (tmp_path / "runs" / name / "report.html").stat().st_size > 10_000

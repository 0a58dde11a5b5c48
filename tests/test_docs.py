"""The documents are true to the tree: links, files, tests, fields, licences."""

import ast
import pathlib
import re

import pytest

from configs import common
from data_builders import build
from mmrjax import methods
from mmrjax.runtime import config as config_lib
from mmrjax.weights import source

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "parity.md").read_text()
NAMED_TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
DEFAULTS = config_lib.flatten(common.get_config())
GROUPS = {name.split(".")[0] for name in DEFAULTS}
FIELDS = {
    (field, value)
    for field, value in re.findall(r"`(\w+\.\w+)(?:=([^`\s]+))?`", TEXT)
    if field.split(".")[0] in GROUPS
}
ROWS = {
    int(cells[0]): cells
    for line in TEXT.splitlines()
    if re.match(r"\| \d+ \|", line)
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}


@pytest.mark.parametrize(("file", "name"), NAMED_TESTS)
def test_every_named_test_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_named_config_field_exists_and_takes_the_named_value():
    assert FIELDS
    for field, value in sorted(FIELDS):
        assert field in DEFAULTS, field
        if value:
            config = config_lib.load("configs/common.py", [f"{field}={value}"])
            config_lib.validate(config, methods.METHODS)


def test_every_quirk_has_a_row_that_names_its_test():
    assert sorted(ROWS) == list(range(1, 35))
    for number, (_, official, ours, _, tests) in ROWS.items():
        assert official, number
        assert ours.startswith(("replicated", "departed")), number
        assert "`tests/" in tests, number


DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCUMENTS, *sorted((ROOT / "docs" / "evidence").glob("*.md"))]


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_within_the_repository_leads_somewhere(path):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            plain = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in plain, anchor


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(path):
    named = re.findall(r"(?<![\w/<>.:])[\w/]+\.(?:py|sh|ipynb)\b", path.read_text())
    folders = (ROOT, ROOT / "mmrjax", ROOT / "configs")
    assert [n for n in named if not any((folder / n).is_file() for folder in folders)] == []


def test_every_document_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in DOCUMENTS[1:] if path.name not in readme] == []


def test_every_data_set_and_every_published_weight_has_its_licence():
    weights, data = (ROOT / "docs/licences.md").read_text().split("## Data sets")
    text = re.sub(r"\W", "", data).lower()
    names = {name: name for name in build.BUILDERS} | {"folder": "yourownfolder"}
    names |= {"mvtec_ad": "mvtecad", "magnetic_tile": "magnetictiles"}
    assert [n for n in names.values() if n.replace("_", "") not in text.replace("_", "")] == []
    numbers = set(re.findall(r"\d+(?:-2)?", weights))
    for name in source.IMAGENET:
        assert re.search(r"\d+(_2)?$", name)[0].replace("_", "-") in numbers, name
    for name in ("EfficientNet-lite0", "MAE ViT-B", "ViT-L"):
        assert name in weights
    assert set(source.MAE) == {"base", "large"}

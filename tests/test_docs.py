"""What docs/parity.md claims: its tests and config fields exist, and every quirk has its row."""

import ast
import pathlib
import re

import pytest

from configs import common
from mmrjax import config as config_lib

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
            config_lib.validate(config)


def test_every_quirk_has_a_row_that_names_its_test():
    assert sorted(ROWS) == list(range(1, 35))
    for number, (_, official, ours, _, tests) in ROWS.items():
        assert official, number
        assert ours.startswith(("replicated", "departed")), number
        assert "`tests/" in tests, number

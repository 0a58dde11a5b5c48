"""The rule of six floors: a module imports its own floor and those below, in no circle."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# From the ground up. A folder stands on one floor; whatever is not named here is a program.
FLOORS = (
    {"models", "runtime"},
    {"data", "weights", "metrics", "report"},
    {"methods"},
    {"train", "evaluate"},
    {"runs"},
)
PROGRAMS = len(FLOORS)


def module_name(path: pathlib.Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


PATHS = {
    module_name(path): path
    for package in ("mmrjax", "data_builders", "configs")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(code: str, name: str, modules: set[str]) -> set[str]:
    """The modules of ours that a module imports, at any depth of it."""
    found = set()
    package = name if name in modules and PATHS.get(name, ROOT).stem == "__init__" else None
    package = package or name.rpartition(".")[0]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = base if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            wanted = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in wanted:
            while full and full not in modules:
                full = full.rpartition(".")[0]
            found |= {full} - {""}
    return found


def floor(name: str) -> int:
    parts = name.split(".")
    if parts[-1] == "__main__" or parts == ["mmrjax"]:
        return PROGRAMS
    return next((i for i, names in enumerate(FLOORS) if parts[1] in names), PROGRAMS)


def forbidden(name: str, other: str) -> bool:
    """Whether the rule forbids module `name` to import module `other`."""
    package, target = name.split(".")[0], other.split(".")[0]
    if package == "configs":  # a method's fields stand in its own file
        return target != "configs" and (name, other) != ("configs.common", "mmrjax.methods")
    if package == "data_builders":
        return target != "data_builders"
    if target == "configs":
        return name != "mmrjax.runtime.config"
    if target == "data_builders":
        return floor(name) < FLOORS.index({"runs"})
    if other == "mmrjax":  # its version
        return False
    if name.startswith("mmrjax.models"):
        return not other.startswith("mmrjax.models")
    if floor(other) == PROGRAMS:  # nobody imports a program, but the parts of a program each other
        return name.split(".")[1:2] != other.split(".")[1:2] and name != "mmrjax"
    return floor(other) > floor(name)


def test_imports_point_down_six_floors():
    assert len(PATHS) > 100
    graph = {name: imports(path.read_text(), name, {*PATHS}) for name, path in PATHS.items()}
    wrong = {
        name: sorted(o for o in others if forbidden(name, o)) for name, others in graph.items()
    }
    assert {name: others for name, others in wrong.items() if others} == {}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a circle


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("mmrjax.data.feed", "from mmrjax.train import loop"),
        ("mmrjax.data.feed", "from ..methods import base"),
        ("mmrjax.data.feed", "from data_builders import build"),
        ("mmrjax.models.vit", "from mmrjax.runtime import mesh"),
        ("mmrjax.methods.mmr", "def f():\n    from mmrjax.runs import restore"),
        ("mmrjax.runs.restore", "from mmrjax import convert"),
        ("mmrjax.runs.restore", "from mmrjax.predict import __main__"),
        ("mmrjax.report.page", "import mmrjax.evaluate.results"),
        ("configs.demo", "from mmrjax.runtime import config"),
        ("data_builders.common", "from mmrjax.data import records"),
    ],
)
def test_the_rule_finds_what_it_forbids(name, code):
    assert any(forbidden(name, other) for other in imports(code, name, {*PATHS}))

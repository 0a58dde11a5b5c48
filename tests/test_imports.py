"""The import rule: nothing looks upward, configurations stay light; and no stray print()."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What each part of mmrjax may import from mmrjax, besides itself: everything in a lower row.
LAYERS = (
    {"files", "memory", "processes", "staging"},
    {
        *("models", "metrics", "mesh", "optim", "logs", "losses", "losses_plus", "config"),
        *("checkpoint", "placement", "visualize", "trackers", "command_line"),
    },
    {"data", "weights", "anomaly_map"},
    {"methods"},
    {"state", "train", "scoring", "evaluate", "workdir", "compare", "aggregate", "calibrate"},
)
# Everything else (main, report, predict, bench ...) is a program: it may import anything, and only
# another program may import it.
ISOLATED = {"models"}  # import only themselves
SHARED = "buckets"  # of data_builders: knows no records
MAY_PRINT = {
    "main.py",
    "command_line.py",
    "convert.py",
    "compare.py",
    "report.py",
    "bench.py",
    "bench_tables.py",
    "bench_metrics.py",
    "bench_torch.py",
    "bench_defects.py",
    "bench_profile.py",
    "predict.py",
    "export.py",
}


def sources(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: pathlib.Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(tree: ast.AST, path: pathlib.Path) -> set[tuple[str, ...]]:
    """Every dotted name that a module imports, at any depth of it; relative ones made absolute."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            found |= {(*base, alias.name) for alias in node.names}
    return found


def parse(path: pathlib.Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def layer_of(part: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if part in names), len(LAYERS))


def part_of(name: tuple[str, ...]) -> str | None:
    """ "data" of mmrjax.data.feed; None for other packages, and for mmrjax itself."""
    return name[1] if name[0] == "mmrjax" and len(name) > 1 else None


def violations(name: tuple[str, ...], imported: set[tuple[str, ...]]) -> list[str]:
    """What a module must not import, by the rules of design.md."""
    package, wrong = name[0], []
    for other in imported:
        top, own_part, part = other[0], part_of(name), part_of(other)
        if package == "data_builders":
            bad = top in ("mmrjax", "configs")
        elif package == "configs":
            bad = top not in ("configs", "ml_collections")
        elif top == "configs":
            bad = own_part != "config"
        elif top == "data_builders":  # programs alone build records
            bad = layer_of(own_part or "") < len(LAYERS) and other[1] != SHARED
        elif part is None or part == own_part:
            bad = False
        elif own_part in ISOLATED:
            bad = True
        else:
            bad = layer_of(part) > layer_of(own_part)
        if bad:
            wrong.append(f"{'.'.join(name)} imports {'.'.join(other)}")
    return sorted(wrong)


@pytest.mark.parametrize("package", ["mmrjax", "data_builders", "configs"])
def test_imports_point_only_downward(package):
    paths = sources(package)
    assert len(paths) > 3
    wrong = [
        line for path in paths for line in violations(module_name(path), imports(parse(path), path))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("mmrjax/data/feed.py", "from mmrjax import train"),
        ("mmrjax/data/feed.py", "import mmrjax.methods.mmr"),
        ("mmrjax/data/feed.py", "from ..methods import base"),
        ("mmrjax/metrics/pro.py", "from mmrjax import evaluate"),
        ("mmrjax/weights/source.py", "from mmrjax.state import create"),
        ("mmrjax/mesh.py", "def f():\n    from mmrjax import main"),
        ("mmrjax/optim.py", "from mmrjax import methods"),
        ("mmrjax/logs.py", "from mmrjax import report"),
        ("mmrjax/models/vit.py", "from mmrjax import losses"),
        ("mmrjax/methods/mmr.py", "from mmrjax import state"),
        ("mmrjax/train.py", "from mmrjax import main"),
        ("mmrjax/train.py", "from data_builders import build"),
        ("mmrjax/staging.py", "from data_builders import buckets, remote"),
        ("mmrjax/train.py", "from configs import common"),
        ("configs/demo.py", "import numpy as np"),
        ("configs/demo.py", "from mmrjax import config"),
        ("data_builders/common.py", "from mmrjax.data import records"),
        ("data_builders/folder/layout.py", "import mmrjax"),
    ],
)
def test_the_rule_finds_violations(name, code):
    path = ROOT / name
    assert violations(module_name(path), imports(ast.parse(code), path))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("mmrjax/data/feed.py", "from mmrjax import logs, mesh\nfrom mmrjax.data import epochs"),
        ("mmrjax/weights/__init__.py", "from mmrjax.models import resnet"),
        ("mmrjax/models/student.py", "from mmrjax.models import vit\nimport flax.linen as nn"),
        ("mmrjax/methods/mmr.py", "from mmrjax import anomaly_map, losses, weights"),
        ("mmrjax/main.py", "from data_builders import build\nfrom mmrjax import report, train"),
        ("mmrjax/config.py", "import configs"),
        ("mmrjax/staging.py", "from data_builders import buckets"),
        ("configs/demo.py", "from configs import common"),
        ("data_builders/build.py", "from data_builders import common\nimport numpy as np"),
    ],
)
def test_the_rule_lets_downward_imports_pass(name, code):
    path = ROOT / name
    assert violations(module_name(path), imports(ast.parse(code), path)) == []


def prints(tree: ast.AST) -> list[int]:
    """Lines that call print(), or hand it to something else."""
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "print"]


def module_level_prints(tree: ast.Module) -> list[int]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n for node in tree.body if not isinstance(node, functions) for n in prints(node)]


def test_library_code_does_not_print():
    found = {}
    for path in sources("mmrjax"):
        tree = parse(path)
        is_program = path.parent == ROOT / "mmrjax" and path.name in MAY_PRINT
        lines = module_level_prints(tree) if is_program else prints(tree)
        if lines:
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found == {}


def test_prints_are_found_wherever_they_hide():
    code = "def f():\n    if x:\n        print(1)\nlog = print\n"
    assert sorted(prints(ast.parse(code))) == [3, 4]
    assert module_level_prints(ast.parse(code)) == [4]
    assert prints(ast.parse("footprint(1); x = 'print(1)'  # print(2)")) == []

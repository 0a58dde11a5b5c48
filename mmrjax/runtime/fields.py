"""Every field of a configuration as the sources declare it: name, default, comment, place.

The sources are read as text (configs/common.py, the `defaults` of the methods, and a configuration
file), so that a misspelled field is refused before JAX is imported. `mmrjax configs` prints them.
"""

import ast
import contextlib
import dataclasses
import functools
import io
import pathlib
import tokenize
from collections.abc import Iterator, Mapping, Sequence

from mmrjax.runtime import config as config_lib

METHODS = pathlib.Path(__file__).resolve().parents[1] / "methods"
OPEN_GROUPS = ("raw_dirs.", "sweep.")  # a configuration file may add fields to these


@dataclasses.dataclass(frozen=True)
class Field:
    """A line of source that sets a field; `text` is the value as written, `place` is file:line."""

    name: str
    text: str
    comment: str
    place: str


def declared() -> Mapping[str, Field]:
    """{name: where its default stands} of configs/common.py and of all methods."""
    return _declared()


@functools.cache
def _declared() -> Mapping[str, Field]:
    found = _of_function(config_lib.PACKAGED / "common.py", "get_config")
    for path in sorted(METHODS.glob("*.py")):
        found |= _of_function(path, "defaults")
    return found


def changed(path: pathlib.Path) -> Mapping[str, Field]:
    """{name: the last line of a configuration file that sets it}; branches are not told apart."""
    return _of_function(path, "get_config")


def check(overrides: Sequence[str]) -> None:
    """Looks at "group.field=value" each, without loading a configuration.

    Raises:
      ValueError: no such field, with the nearest names, or a value of another type.
    """
    known = declared()
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--config.{name}: give a value, as in --config.{name}=…")
        if name.startswith(OPEN_GROUPS):
            continue
        if name not in known:
            hint = config_lib.nearest(name, list(known))
            raise ValueError(f"--config.{name}: no such field; {hint}")
        with contextlib.suppress(_NoLiteral):
            config_lib.parse(name, value, _literal(known[name].text))


def constants(name: str) -> list[str]:
    """The texts that the classes of methods/ give an attribute, such as `name`; sorted."""
    found = set()
    for path in METHODS.glob("*.py"):
        for kind in ast.parse(path.read_text(encoding="utf-8")).body:
            for node in kind.body if isinstance(kind, ast.ClassDef) else ():
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                    found.add(_literal(ast.unparse(node.value)))
    return sorted(found - {""})


class _NoLiteral(Exception):
    """A default that is computed, such as 50 / 200."""


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError) as e:
        raise _NoLiteral from e


def _of_function(path: pathlib.Path, name: str) -> dict[str, Field]:
    """The fields that functions called `name` of a file set, in the order of the source."""
    source = path.read_text(encoding="utf-8")
    reader = _Reader(path, source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            reader.read(node)
    return reader.found


class _Reader:
    """Follows the assignments of a function to a ConfigDict."""

    def __init__(self, path: pathlib.Path, source: str):
        """Nothing is read yet but the comments."""
        self._path, self._source, self._comments = path, source, _comments(source)
        self.found: dict[str, Field] = {}

    def read(self, function: ast.FunctionDef) -> None:
        """Adds the fields of a function to `found`."""
        groups, own, merged = {"config": ""}, {}, {}
        for node in _statements(function.body):
            if isinstance(node, ast.Assign):
                self._assignment(node, groups, own, merged)
            elif isinstance(node, ast.Return) and node.value is not None:
                for group, variable in _returned(node.value):
                    self._add_all(own.get(variable, ()), f"{group}.")
                    for module in merged.get(variable, ()):
                        self._add_all(_of_dict(METHODS / f"{module}.py"), f"{group}.")

    def _assignment(self, node: ast.Assign, groups: dict, own: dict, merged: dict) -> None:
        variables = [target.id for target in node.targets if isinstance(target, ast.Name)]
        dotted = [_dotted(target) for target in node.targets if isinstance(target, ast.Attribute)]
        if _is_group(node.value):
            for root, attributes in dotted:
                groups |= {name: f"{groups.get(root, '')}{attributes}." for name in variables}
            if not dotted:
                own |= {name: [] for name in variables}
        elif variables:
            merged |= {name: _modules(node.value) for name in variables}
        for root, attributes in dotted if not _is_group(node.value) else ():
            field = self._field(attributes, node, node.value)
            if root in groups:
                self._add_all([field], groups[root])
            elif root in own:
                own[root].append(field)

    def _field(self, name: str, node: ast.AST, value: ast.expr) -> Field:
        text = ast.get_source_segment(self._source, value) or ""
        comment = _comment(self._comments, node.lineno, node.end_lineno or node.lineno)
        place = f"{self._path.parent.name}/{self._path.name}:{node.lineno}"
        return Field(name, " ".join(text.split()), comment, place)

    def _add_all(self, fields: Sequence[Field], prefix: str) -> None:
        for field in fields:
            self.found[prefix + field.name] = dataclasses.replace(field, name=prefix + field.name)

    def of_dict(self, node: ast.Dict) -> list[Field]:
        """The entries of a literal {"field": value}."""
        return [
            self._field(key.value, value, value)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        ]


def _of_dict(path: pathlib.Path) -> list[Field]:
    """The fields of a module whose `defaults` returns a literal dict."""
    source = path.read_text(encoding="utf-8")
    reader = _Reader(path, source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "defaults":
            last = node.body[-1]
            if isinstance(last, ast.Return) and isinstance(last.value, ast.Dict):
                return reader.of_dict(last.value)
    return []


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """All statements in the order of the source, those of branches and loops included."""
    for node in body:
        yield node
        for name in ("body", "orelse"):
            yield from _statements(getattr(node, name, []))


def _is_group(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value) == "ConfigDict()"


def _dotted(target: ast.Attribute) -> tuple[str, str]:
    """(variable, attributes) of `config.data.name`."""
    root, _, attributes = ast.unparse(target).partition(".")
    return root, attributes


def _returned(value: ast.expr) -> Iterator[tuple[str, str]]:
    """(group, variable) of each entry of `ConfigDict({"group": variable})`."""
    for node in ast.walk(value):
        if isinstance(node, ast.Dict):
            for key, entry in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(entry, ast.Name):
                    yield key.value, entry.id


def _modules(value: ast.expr) -> list[str]:
    """The modules of `a.defaults() | b.defaults()`."""
    calls = [node.func for node in ast.walk(value) if isinstance(node, ast.Call)]
    return [
        call.value.id
        for call in calls
        if isinstance(call, ast.Attribute)
        and call.attr == "defaults"
        and isinstance(call.value, ast.Name)
    ]


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """{line: (text of its comment, whether the line has nothing else)}."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = token.string.lstrip("# "), alone
    return found


def _comment(comments: Mapping[int, tuple[str, bool]], first: int, last: int) -> str:
    """The comment lines above a statement and the comments beside it, as one text."""
    above = []
    line = first - 1
    while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
    beside = [comments[line][0] for line in range(first, last + 1) if line in comments]
    return " ".join([*above, *beside])

"""Small files written so that nobody ever sees half of one."""

import json
import os
import pathlib


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes `text` to a neighbour of `path` and renames it; makes the folder when absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def read_json(path: pathlib.Path) -> dict | None:
    """The content of a JSON file; None when it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

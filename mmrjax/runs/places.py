"""The run that a person means: a run, a folder with one run in it, or the name of a data set.

Every verb of `mmrjax` and `mmrjax.load` ask here. Only names of files are read, before JAX is
imported.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from mmrjax.runtime import files

ROOT = "runs"  # of all work directories that nobody named
_DEPTHS = (
    "",
    "*",
    "*/*",
    "*/*/*",
)  # a run lies in <workdir>/<method>/<category>/, deeper in a sweep
SHOWN = 6  # runs that an error names


def address(text: str) -> str:
    """A work directory of a command line, as argparse's `type`: a folder, or an address.

    Raises:
      argparse.ArgumentTypeError: nothing, or an address of another kind than gs://.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name is empty; give a folder")
    try:
        return files.check_address(text) if files.is_remote(text) else text
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def runs(folder: pathlib.Path, file: str = "config.json") -> list[pathlib.Path]:
    """The runs with a file in a folder: a run, or up to a folder of work directories; sorted."""
    if (folder / file).is_file():
        return [folder]
    found = {run for above in _DEPTHS for run in _below(folder, above, file)}
    return sorted(run for run in found if "evaluations" not in run.relative_to(folder).parts)


def _below(folder: pathlib.Path, above: str, file: str) -> list[pathlib.Path]:
    pattern = f"{above}/seed*/{file}".lstrip("/")
    found = [path.parent for path in folder.glob(pattern)]
    return [run for run in found if files.is_run_name(run.name)]


def workdir(given: str | None) -> str:
    """The work directory that is meant, as `run` finds a run.

    Args:
      given: a work directory, a run in it, the name of a data set, or None for the latest.
    """
    if given is not None and files.is_remote(given):
        return given
    if given is not None and (pathlib.Path(given) / "results.json").is_file():
        if not _is_run(pathlib.Path(given)):
            return given
    found = [run.resolve().parents[2] for run in _meant(given)]
    homes = sorted(set(found), key=str)
    if given is not None and len(homes) > 1:
        raise ValueError(_several(given, homes, "work directories"))
    return _short(found[-1])


def run(given: str | os.PathLike | None) -> str:
    """The run that is meant.

    Args:
      given: a run, a folder with a single run in it, an address in a bucket, the name of a data
        set with a single run in runs/, or None for the latest run in runs/.

    Returns:
      Its folder, or the address as it is.

    Raises:
      FileNotFoundError: there is none, with the command that makes one.
      ValueError: there are several, naming them.
    """
    if given is not None and files.is_remote(given):
        return str(given)
    found = _meant(None if given is None else str(given))
    if given is not None and len(found) > 1:
        raise ValueError(_several(str(given), found, "runs"))
    return str(found[-1])


def _meant(given: str | None) -> list[pathlib.Path]:
    """The runs that fit; the latest is the last."""
    if given is None:
        found = _by_age(runs(pathlib.Path(ROOT)))
        if not found:
            raise FileNotFoundError(
                f"no run in {pathlib.Path(ROOT).resolve()}; train first: mmrjax train <folder of "
                "good parts>, or name a run with --workdir"
            )
        return found
    place = pathlib.Path(given)
    if place.is_dir():
        found = runs(place)
        if not found:
            raise FileNotFoundError(
                f"{place} holds no run; give the --workdir of a training, such as runs/parts"
            )
        return found
    known = runs(pathlib.Path(ROOT))
    named = [
        one for one in known if given in one.relative_to(ROOT).parts or _trained_on(one, given)
    ]
    if not named:
        hint = f"; runs in {ROOT}: {_listed(known)}" if known else ""
        raise FileNotFoundError(f"{given}: no such folder, and no run of that name{hint}")
    return _by_age(named)


def home(run_folder: str) -> pathlib.Path:
    """The work directory of a run, as relative or absolute as the run is given."""
    above = pathlib.Path(run_folder).parents
    return above[2] if len(above) > 2 else pathlib.Path(run_folder).resolve().parents[2]


def groups(given: str) -> dict[tuple[str, str], pathlib.Path]:
    """{(method, category): the folder of its seeds} of all scored runs in a folder, or of a name.

    Raises:
      FileNotFoundError: there is none.
    """
    place = pathlib.Path(given)
    found = runs(place, "scores.csv") if place.is_dir() else _meant(given)
    if not found:
        raise FileNotFoundError(
            f"no runs in {given}; expected <workdir>/<method>/<category> with folders seed<k>, or "
            "the work directory"
        )
    return {one.parts[-3:-1]: one.parent for one in (run.resolve() for run in found)}


def _is_run(folder: pathlib.Path) -> bool:
    return (folder / "config.json").is_file() and files.is_run_name(folder.resolve().name)


def _trained_on(one: pathlib.Path, name: str) -> bool:
    stored = files.read_json(one / "config.json") or {}
    return stored.get("data", {}).get("name") == name


def _by_age(found: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """The oldest first: by results.json, which a finished run has, before those without."""

    def age(one: pathlib.Path) -> tuple[bool, float]:
        results = one / "results.json"
        done = results.is_file()
        return done, (results if done else one / "config.json").stat().st_mtime

    return sorted(found, key=age)


def _several(given: str, found: Sequence[pathlib.Path], what: str) -> str:
    return f"{given} holds {len(found)} {what}; name one of them: {_listed(found)}"


def _listed(found: Sequence[pathlib.Path]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(_short(one) for one in found[:SHOWN]) + more


def _short(folder: pathlib.Path) -> str:
    """The path from here, if it lies here."""
    try:
        return str(folder.resolve().relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(folder)

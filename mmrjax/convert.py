"""Weights between PyTorch and mmrjax: python -m mmrjax.convert from-torch|to-torch --kind=….

`from-torch` checks a PyTorch file against an architecture and writes it in our format (see
weights/storage.py), for --config.teacher.weights or --config.student.init. `to-torch` takes such a
file, or the run folder of a training (<workdir>/mmr/<category>/seed<k>), of which it reads the
newest checkpoint, and writes a state dict with the names of the official code, beside it what no
tensor shows. The way to PyTorch and back returns the same bits. The functions behind it are those
of weights/torch_names.py.
"""

import argparse
import contextlib
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from absl import logging

from mmrjax import methods
from mmrjax.data import geometry
from mmrjax.methods import mmr
from mmrjax.models import backbones
from mmrjax.models import student as student_lib
from mmrjax.runs import arguments as arguments_lib
from mmrjax.runs import restore, staging
from mmrjax.runtime import checkpoint, command_line, files
from mmrjax.weights import layouts, mae_names, source, storage, teachers, torch_names

WHOLE = restore.WHOLE
# The content of a file in our format, by --kind.
CONTENT = {"teacher": "teacher", "mae": "encoder", "timm": "encoder"} | {
    kind.official: "autoencoder" if kind.official == WHOLE else "student"
    for kind in methods.METHODS.values()
    if kind.official
}
LICENCES = {
    "mae": source.MAE_LICENCE,
    WHOLE: source.MAE_LICENCE,
    "timm": "Apache-2.0 (the checkpoints of timm's authors)",
}
INSIDE = {"student": "encoder", "autoencoder": "encoder"}  # the content that others have in them
# Facts beside the weights that go with them wherever they go.
CARRIED = ("random", "step", "teacher", "image_size", "resize", "interpolation", "decoder_heads")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = arguments_lib.parse_convert(argv)
    # Nothing is computed, and a training may hold the accelerator.
    jax.config.update("jax_platforms", "cpu")
    return command_line.run(lambda: _run(arguments), "; nothing was written")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.output.exists():
        raise ValueError(f"--output={arguments.output} exists; choose another name or delete it")
    with _opened(arguments.input) as (path, store):
        own = (arguments.kind, arguments.arch, path, arguments.output)
        lines = from_torch(*own) if arguments.verb == "from-torch" else to_torch(*own, store)
    print("\n".join([*lines, f"wrote {arguments.output}"]))
    return 0


@contextlib.contextmanager
def _opened(place: str) -> Iterator[tuple[pathlib.Path, checkpoint.Store | None]]:
    """The file or run folder of --input, a copy if it is in a bucket; and the run's checkpoints."""
    if not files.is_remote(place):
        yield pathlib.Path(place).expanduser(), None
    elif pathlib.PurePath(place).suffix in source.SUFFIXES:
        yield source.remote_file(place), None
    else:
        with staging.opened(place, ".json") as stage:
            yield stage.folder, stage.store(stage.folder)


def from_torch(kind: str, arch: str, path: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Converts a PyTorch file to one of ours.

    Args:
      kind: a key of CONTENT.
      arch: architecture of the teacher, or size of the student, or "width,depth,heads"; "" if the
        file comes from mmrjax, which states it.
      path: a state dict, .safetensors, .npz or .pth.
      output: .safetensors.

    Returns:
      Lines for people: used, missing and unused entries, and the licence.

    Raises:
      FileNotFoundError, ValueError: no such file, or one that is damaged or does not fit.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"--output={output}: our format is .safetensors")
    if storage.is_ours(path):
        raise ValueError(f"--input={path} is in our format already")
    if path.is_dir():
        raise ValueError(f"--input={path} is a folder; from-torch takes a file")
    state, header = source.read(path)
    if header.get("kind") in storage.KINDS:  # written by to_torch
        arch = _known_arch(kind, arch, header, path)
    elif kind == "timm" and torch_names.is_mae(state):
        raise ValueError(
            f"--input={path} has MAE's decoder or its fixed position table, and MAE's weights are "
            f"{source.MAE_LICENCE}: use --kind=mae"
        )
    arch = _arch_name(kind, arch)
    _check(state, kind, arch, f"{path.name} as --kind={kind} --arch={arch}")
    if kind == "teacher":
        used, missing = teachers.used(state, backbones.architecture(arch)), []
        variables = teachers.from_torch(state, backbones.architecture(arch))
    elif kind == WHOLE:
        used, missing, variables = state, [], mae_names.from_torch(state)
    elif CONTENT[kind] == "student":
        used, missing = state, []
        layers = tuple(torch_names.student_channels(state))
        variables = torch_names.student_from_torch(state, layers)
    else:
        used = torch_names.encoder_part(state)
        missing = [key for key in torch_names.OPTIONAL if key not in used]
        variables = torch_names.encoder_from_torch(state)
    digest = source.sha256(path)
    facts = {name: header[name] for name in CARRIED if name in header} | {
        "kind": CONTENT[kind],
        "arch": arch,
        "licence": storage.licence(header, LICENCES.get(kind) or source.licence(digest)),
        "converted_from": path.name,
        "converted_from_sha256": digest,
    }
    storage.write(output, variables, facts)
    report = {**torch_names.usage(state, used), "missing": missing}
    lines = [f"{name:8}{_summary(report[name])}" for name in ("used", "missing", "unused")]
    return [*lines, f"licence {facts['licence']}"]


def _check(state: layouts.State, kind: str, arch: str, what: str) -> None:
    """Raises ValueError unless the tensors are those of `arch`; its message begins with `what`."""
    if kind == "teacher":
        teachers.check(state, backbones.architecture(arch), what)
        return
    if kind == WHOLE:
        try:
            like = mae_names.hollow(state, student_size(arch))
        except ValueError as e:
            raise ValueError(f"{what}: {e}") from e
        mae_names.check(state, like, what)
        return
    model = student_lib.MaskedStudent(*student_size(arch), torch_names.student_channels(state))
    like = layouts.hollow(model.init, jnp.zeros((1, 224, 224, 3)))
    torch_names.check_student(state, like, CONTENT[kind] == "student", what)


def to_torch(
    kind: str,
    arch: str,
    path: pathlib.Path,
    output: pathlib.Path,
    store: checkpoint.Store | None = None,
) -> list[str]:
    """Converts a file of ours, or what a run folder holds, to a PyTorch file.

    Args:
      kind: teacher, of a run the one it was trained with; mmr; mae_whole; mae or timm, the
        encoder alone.
      arch: "", or what it must be.
      path: a file in our format, or <workdir>/mmr/<category>/seed<k>.
      output: .safetensors or .pth, with the facts that tensors do not show beside them.
      store: the checkpoints of a run; None takes those in `path`.

    Returns:
      Lines for people.

    Raises:
      FileNotFoundError, ValueError: nothing there, or damaged, or something else than `kind`.
    """
    if path.is_dir():
        variables, facts, grid = _of_run(path, kind, store)
    else:
        variables, facts, grid = (*storage.read(path), None)
    arch = _known_arch(kind, arch, facts, path)
    if kind == "teacher":
        state = teachers.to_torch(variables, backbones.architecture(arch))
    elif kind == WHOLE:
        state = mae_names.to_torch(variables, grid)
    elif CONTENT[kind] == "student":
        state = torch_names.student_to_torch(variables, grid)
    else:
        state = torch_names.encoder_to_torch(variables, grid)
    _check(state, kind, arch, f"--input={path}")
    facts["kind"] = CONTENT[kind]  # of a student, perhaps the encoder alone
    if kind != "teacher":
        facts["heads"] = str(student_size(arch)[2])
    # MAE's own code looks for the state dict under "model".
    storage.write_torch(output, state, facts, wrapper="model" if kind in ("mae", WHOLE) else "")
    known = [f"{name:8}{facts[name]}" for name in ("arch", "step", "licence") if name in facts]
    return [f"tensors {len(state)}", *known]


def _of_run(
    folder: pathlib.Path, kind: str, store: checkpoint.Store | None
) -> tuple[dict, dict[str, str], tuple[int, int] | None]:
    """(variables, facts, grid of patches) of a run's teacher or student."""
    config = restore.read_config(folder)
    if kind == "teacher":
        variables, about = restore.teacher(config, folder)
        facts = {"kind": "teacher", "arch": about["name"], "random": str(about["random"]).lower()}
        if about["licence"]:  # None of random weights
            facts["licence"] = about["licence"]
        return variables, facts, None
    if kind == WHOLE:
        return _autoencoder(config, folder, store)
    variables, step = restore.student(config, folder, store)
    if "attention" in variables:
        raise ValueError(
            f"--input={folder}: the heads of this student see a part of the image each "
            "(mmr_plus.hybrid), which the official PyTorch student cannot; convert a run without"
        )
    if config.score.by_place:
        logging.warning(
            "%s: maps of this run are by place (score.by_place), and a PyTorch file has no room "
            "for the statistics: the plain maps come out of it; mmrjax.export keeps them",
            folder,
        )
    view = geometry.View.of(config, evaluation=True)
    facts = {
        "kind": "student",
        "arch": _arch_name(kind, ",".join(map(str, mmr.student_size(config.student)))),
        "step": str(step),
        "teacher": config.teacher.name,
        "image_size": "{},{}".format(*view.size),
        "resize": "{},{}".format(*view.resize),
        "interpolation": view.interpolation,
    }
    if licence := restore.student_licence(config, folder):
        facts["licence"] = licence
    patch = student_lib.MaskedStudent.patch
    return variables, facts, (view.size[0] // patch, view.size[1] // patch)


def _autoencoder(config, folder: pathlib.Path, store: checkpoint.Store | None) -> tuple:
    """The masked autoencoder of a run, as `_of_run` gives it."""
    variables, step, model = restore.autoencoder(config, folder, store)
    size = f"{model.width},{model.depth},{model.heads}"
    facts = {
        "kind": "autoencoder",
        "arch": _arch_name(WHOLE, size),
        "step": str(step),
        "decoder_heads": str(model.decoder_heads),
        "image_size": "{},{}".format(*config.data.image_size),
    }
    if licence := (restore.results_facts(folder).get("student") or {}).get("licence"):
        facts["licence"] = licence
    return variables, facts, model.grid


def _known_arch(kind: str, arch: str, facts: dict[str, str], path: pathlib.Path) -> str:
    """The architecture that a file of ours or of `to_torch` states.

    Raises:
      ValueError: it holds something else than `kind`, or states another one than `arch`.
    """
    if CONTENT[kind] not in (facts["kind"], INSIDE.get(facts["kind"])):
        raise ValueError(
            f"--input={path} holds weights of kind {facts['kind']}; --kind={kind} needs "
            f"{CONTENT[kind]}"
        )
    known = facts.get("arch", arch)
    if arch and _arch_name(kind, arch) != known:
        raise ValueError(f"--input={path} holds the architecture {known}, not {arch}")
    return known


def student_size(arch: str) -> tuple[int, int, int]:
    """(width, depth, heads) of "base" or of "768,12,12".

    Raises:
      ValueError: neither, with what there is.
    """
    if arch in mmr.SIZES:
        return mmr.SIZES[arch]
    numbers = arch.split(",")
    if len(numbers) == 3 and all(n.isdecimal() and int(n) for n in numbers):
        return tuple(map(int, numbers))
    raise ValueError(f"--arch={arch}: expected {', '.join(mmr.SIZES)} or WIDTH,DEPTH,HEADS")


def _arch_name(kind: str, arch: str) -> str:
    """The one way to write an architecture; ValueError when there is none like it."""
    if kind == "teacher":
        backbones.architecture(arch)
        return arch
    size = student_size(arch)
    return next((name for name, known in mmr.SIZES.items() if known == size), arch)


def _summary(keys: Sequence[str]) -> str:
    """How many there are and their names, those of all blocks as one: blocks.*.norm1.bias."""
    names = dict.fromkeys(re.sub(r"(blocks|layer\d)\.\d+\.", r"\1.*.", key) for key in keys)
    return f"{len(keys)}: {', '.join(names)}" if keys else "none"


if __name__ == "__main__":
    sys.exit(main())

"""Pretrained weights: `load_teacher` and `init_student` are all that methods need.

`teacher_file` and `student_file` find the same files without reading them. No function downloads:
an absent published file is the error `source.NotCached`.
"""

import pathlib

import jax
import jax.numpy as jnp
from absl import logging

from mmrjax.models import backbones
from mmrjax.runtime import files
from mmrjax.weights import mae_names, source, storage, teachers, torch_names, vit_sources

RANDOM_TEACHER = (
    "THE TEACHER IS RANDOM: %s has never seen an image. Scores show that the program runs, not "
    "what the method can do; use --config.teacher.name=efficientnet_lite0 "
    "--config.teacher.weights=embedded, or --config.teacher.weights=imagenet, or a file."
)
WITHOUT_DOWNLOAD = (
    "; without a download there is --config.teacher.name=efficientnet_lite0 "
    "--config.teacher.weights=embedded"
)
WORDS = "'embedded', 'imagenet', 'published' or 'random'"


def teacher_file(name: str, weights: str) -> pathlib.Path | None:
    """The file of a teacher's weights; None for random weights.

    Arguments as in `load_teacher`.

    Raises:
      FileNotFoundError, ValueError: no such architecture or file.
    """
    backbones.architecture(name)
    if weights == "random":
        return None
    words = {
        "embedded": source.PACKAGED,
        "imagenet": {**source.IMAGENET, **source.PACKAGED},
        "published": vit_sources.PUBLISHED,
    }
    if weights not in words:
        return _local("teacher.weights", weights, WORDS)
    if name not in words[weights]:
        raise ValueError(
            f"teacher.weights={weights!r} exists for teacher.name in {sorted(words[weights])}, not "
            f"{name!r}{WITHOUT_DOWNLOAD}"
        )
    known = words[weights][name]
    if isinstance(known, source.Packaged):
        return source.packaged_file(known)
    if weights == "published":
        return source.published_file(known, vit_sources.advice(name))
    return source.published_file(known, WITHOUT_DOWNLOAD)


def student_file(init: str, size: str, group: str = "student") -> pathlib.Path | None:
    """The file of a student's initial weights, as `teacher_file`; None from scratch.

    Arguments and errors as in `init_student`; `group` is that of the fields `init` and `size`.
    """
    if init == "scratch":
        return None
    if init != "mae":
        return _local(f"{group}.init", init, "'mae' or 'scratch'")
    if size not in source.MAE:
        raise ValueError(
            f"{group}.init='mae' has published weights for {group}.size in "
            f"{sorted(source.MAE)}, not {size!r}; use 'scratch' or a file"
        )
    return source.published_file(source.MAE[size])


def _local(field: str, value: str, words: str) -> pathlib.Path:
    if files.is_remote(value):
        try:
            return source.remote_file(value)
        except (OSError, ValueError) as e:
            raise type(e)(f"{field}={value!r}: {e}") from e
    path = pathlib.Path(value).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{field}={value!r}: no weights file at {path}; expected a file, {words}"
        )
    return path


def load_teacher(name: str, weights: str, seed: int = 0) -> tuple[backbones.Backbone, dict, dict]:
    """Loads the frozen teacher, of any family.

    Args:
      name: of `models.backbones.names()`.
      weights: "embedded" (the file in this package), "imagenet" (the published file of a ResNet in
        the cache), "published" (that of a ViT), "random", or a file.
      seed: draws the random weights.

    Returns:
      (the backbone with all layers of its family's default taps, its variables as float32 NumPy
      arrays, facts for results.json).

    Raises:
      FileNotFoundError, ValueError: a missing, damaged or unfitting file.
    """
    backbone = backbones.build(name)
    path = teacher_file(name, weights)
    if path is None:
        logging.warning(RANDOM_TEACHER, name)
        facts = {"name": name, "source": f"random, seed {seed}", "sha256": None, "licence": None}
        return backbone, teachers.random(backbone.arch, seed), {**facts, "random": True}
    try:
        state, header = storage.read_any(path)
        variables = teachers.from_torch(state, backbone.arch)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"teacher.weights={weights!r}: {e}; expected a file, {WORDS}"
        ) from e
    except ValueError as e:
        raise ValueError(f"teacher.weights={weights!r} for teacher.name={name!r}: {e}") from e
    digest = source.sha256(path)
    licence = storage.licence(header, vit_sources.licence(name, weights, digest))
    logging.info("teacher %s from %s; licence: %s", name, path, licence)
    facts = {"name": name, "source": path.name, "sha256": digest, "licence": licence}
    facts |= storage.origin(header)
    is_random = header.get("random") == "true"  # exported from a run with a random teacher
    if is_random:
        logging.warning(RANDOM_TEACHER, name)
    return backbone, variables, {**facts, "random": is_random}


def init_student(
    variables: dict, init: str, size: str, grid: tuple[int, int] | None = None
) -> tuple[dict, dict]:
    """Replaces freshly drawn student variables by pretrained ones.

    Args:
      variables: {"params", "positions"} from `MaskedStudent.init`.
      init: "scratch", "mae" (the published checkpoint for `size`), or a file: a MAE or timm
        ViT checkpoint, a whole MMR student under the official key names, or either as
        `mmrjax.convert from-torch` writes it.
      size: "base" or "large" for "mae".
      grid: patches per column and per row of an image; None if both are equal.

    Returns:
      (variables, facts for results.json).

    Raises:
      FileNotFoundError, ValueError: a missing, damaged or unfitting file.
    """
    return _initial(variables, init, size, grid, "student", torch_names.merge_student)


def init_autoencoder(
    variables: dict, init: str, size: str, grid: tuple[int, int], group: str
) -> tuple[dict, dict]:
    """Replaces freshly drawn variables of a masked autoencoder by pretrained ones.

    Args:
      variables: {"params", "positions"} from `MaskedAutoencoder.init`.
      init: as in `init_student`; a file may hold a decoder or the encoder alone.
      size: as in `init_student`.
      grid: patches per column and per row of an image.
      group: of the fields `init` and `size`, for messages.

    Returns:
      (variables, facts for results.json, in which "decoder" tells whether the file had one and
      "mae" whether it is MAE's).

    Raises:
      FileNotFoundError, ValueError: a missing, damaged or unfitting file.
    """
    return _initial(variables, init, size, grid, group, mae_names.merge)


def _initial(variables, init, size, grid, group, merge) -> tuple[dict, dict]:
    """`init_student` and `init_autoencoder`; `merge` puts a state dict into variables."""
    path = student_file(init, size, group)
    if path is None:
        return variables, {"init": "scratch", "source": None, "sha256": None, "licence": None}
    try:
        state, header = storage.read_any(path)
        new, report = merge(jax.device_get(variables), state, grid)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"{group}.init={init!r}: {e}; expected a file, 'mae' or 'scratch'"
        ) from e
    except ValueError as e:
        raise ValueError(f"{group}.init={init!r}: {e}") from e
    is_mae = init == "mae" or torch_names.is_mae(state)
    licence = storage.licence(header, source.MAE_LICENCE if is_mae else source.LOCAL)
    logging.info(
        "%s from %s: %d tensors used, %d unused, missing %s; licence: %s",
        group,
        path,
        len(report["used"]),
        len(report["unused"]),
        ", ".join(report["missing"]) or "none",
        licence,
    )
    for table in report["replaced"]:
        how = "was resized (bicubic)" if table == "encoder_table" else "is drawn anew"
        logging.warning("positions/%s is of another image size: it %s", table, how)
    facts = {"init": init, "source": path.name, "sha256": source.sha256(path), "licence": licence}
    facts |= storage.origin(header)
    if merge is mae_names.merge:
        facts |= {"mae": is_mae, "decoder": mae_names.has_decoder(state)}
    return jax.tree.map(jnp.asarray, new), {**facts, "position_tables_replaced": report["replaced"]}

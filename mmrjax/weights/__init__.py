"""Pretrained weights: `load_teacher` and `init_student` are all that methods need."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mmrjax.models import resnet
from mmrjax.weights import layouts, source, storage, torch_names

LOCAL = "unknown: a local file"
RANDOM_TEACHER = (
    "THE TEACHER IS RANDOM: %s has never seen an image. Scores show that the program runs, not "
    "what the method can do; set --config.teacher.weights=imagenet or to a file."
)


def load_teacher(name: str, weights: str, seed: int = 0) -> tuple[dict, dict]:
    """Loads the frozen teacher.

    Args:
      name: an architecture of `models.resnet.ARCHITECTURES`.
      weights: "imagenet" (the published file, from cache or URL), "random", or a file.
      seed: of the random weights.

    Returns:
      (variables of `models.resnet.ResNet` as float32 NumPy arrays, facts for results.json).

    Raises:
      FileNotFoundError, ValueError: a missing, damaged or unfitting file.
    """
    arch = resnet.architecture(name)
    if weights == "random":
        logging.warning(RANDOM_TEACHER, name)
        facts = {"name": name, "source": f"random, seed {seed}", "sha256": None, "licence": None}
        return _random_teacher(arch, seed), {**facts, "random": True}
    if weights == "imagenet":
        path, licence = source.published_file(source.IMAGENET[name]), source.IMAGENET_LICENCE
    else:
        path, licence = pathlib.Path(weights).expanduser(), LOCAL
    try:
        state, header = storage.read_any(path)
        variables = torch_names.teacher_from_torch(state, arch)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"teacher.weights={weights!r}: {e}; expected a file, 'imagenet' or 'random'"
        ) from e
    except ValueError as e:
        raise ValueError(f"teacher.weights={weights!r} for teacher.name={name!r}: {e}") from e
    licence = header.get("licence", licence)
    logging.info("teacher %s from %s; licence: %s", name, path, licence)
    facts = {"name": name, "source": path.name, "sha256": source.sha256(path), "licence": licence}
    is_random = header.get("random") == "true"  # exported from a run with a random teacher
    if is_random:
        logging.warning(RANDOM_TEACHER, name)
    return variables, {**facts, "random": is_random}


def _random_teacher(arch: resnet.Architecture, seed: int) -> dict:
    """Torchvision's initial values: Kaiming-normal (fan-out), BatchNorm 1/0, folded."""
    rng = np.random.default_rng(seed)

    def draw(leaf: np.ndarray) -> np.ndarray:
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        fan_out = leaf.shape[0] * leaf.shape[1] * leaf.shape[3]
        scale = np.sqrt(2.0 / fan_out / (1 + torch_names.BATCH_NORM_EPSILON))
        return (rng.standard_normal(leaf.shape) * scale).astype(np.float32)

    image = jnp.zeros((1, 64, 64, 3))
    return jax.tree.map(draw, layouts.hollow(resnet.ResNet(arch).init, image))


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
      grid: patches per column and per row of an image; None where both are equal.

    Returns:
      (variables, facts for results.json).

    Raises:
      FileNotFoundError, ValueError: a missing, damaged or unfitting file.
    """
    if init == "scratch":
        return variables, {"init": "scratch", "source": None, "sha256": None, "licence": None}
    if init == "mae":
        if size not in source.MAE:
            raise ValueError(
                f"student.init='mae' has published weights for student.size in "
                f"{sorted(source.MAE)}, not {size!r}; use 'scratch' or a file"
            )
        path, licence = source.published_file(source.MAE[size]), source.MAE_LICENCE
    else:
        path, licence = pathlib.Path(init).expanduser(), LOCAL
    try:
        state, header = storage.read_any(path)
        new, report = torch_names.merge_student(jax.device_get(variables), state, grid)
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"student.init={init!r}: {e}; expected a file, 'mae' or 'scratch'"
        ) from e
    except ValueError as e:
        raise ValueError(f"student.init={init!r}: {e}") from e
    licence = header.get("licence", licence)
    logging.info(
        "student from %s: %d tensors used, %d unused, missing %s; licence: %s",
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
    return jax.tree.map(jnp.asarray, new), {**facts, "position_tables_replaced": report["replaced"]}

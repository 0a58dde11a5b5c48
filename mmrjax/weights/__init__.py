"""Pretrained weights: `load_teacher` and `init_student` are all that methods need."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mmrjax.models import resnet
from mmrjax.weights import source, torch_names


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
        logging.warning(
            "THE TEACHER IS RANDOM: %s has never seen an image. Scores show that the program runs, "
            "not what the method can do; set --config.teacher.weights=imagenet or to a file.",
            name,
        )
        facts = {"name": name, "source": f"random, seed {seed}", "sha256": None, "licence": None}
        return _random_teacher(arch, seed), {**facts, "random": True}
    if weights == "imagenet":
        path, licence = source.published_file(source.IMAGENET[name]), source.IMAGENET_LICENCE
    else:
        path, licence = pathlib.Path(weights).expanduser(), "unknown: a local file"
    try:
        variables = torch_names.teacher_from_torch(source.read_state(path), arch)
    except ValueError as e:
        raise ValueError(f"teacher.weights={weights!r} for teacher.name={name!r}: {e}") from e
    wanted = {
        jax.tree_util.keystr(k): v
        for k, v in jax.tree_util.tree_leaves_with_path(_teacher_shapes(arch))
    }
    given = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(variables)}
    torch_names.check_shapes(given, wanted, f"teacher.weights={weights!r} as {name!r}")
    logging.info("teacher %s from %s; licence: %s", name, path, licence)
    facts = {"name": name, "source": path.name, "sha256": source.sha256(path), "licence": licence}
    return variables, {**facts, "random": False}


def _teacher_shapes(arch: resnet.Architecture) -> dict:
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    return jax.eval_shape(resnet.ResNet(arch).init, jax.random.key(0), image)


def _random_teacher(arch: resnet.Architecture, seed: int) -> dict:
    """Torchvision's initial values: Kaiming-normal (fan-out), BatchNorm 1/0, folded."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        fan_out = leaf.shape[0] * leaf.shape[1] * leaf.shape[3]
        scale = np.sqrt(2.0 / fan_out / (1 + torch_names.BATCH_NORM_EPSILON))
        return (rng.standard_normal(leaf.shape) * scale).astype(np.float32)

    return jax.tree.map(draw, _teacher_shapes(arch))


def init_student(variables: dict, init: str, size: str) -> tuple[dict, dict]:
    """Replaces freshly drawn student variables by pretrained ones.

    Args:
      variables: {"params", "positions"} from `MaskedStudent.init`.
      init: "scratch", "mae" (the published checkpoint for `size`), or a file: a MAE or timm
        ViT checkpoint, or a whole MMR student under the official key names.
      size: "base" or "large" for "mae".

    Returns:
      (variables, facts for results.json).
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
        path, licence = pathlib.Path(init).expanduser(), "unknown: a local file"
    state = {
        k: v.astype(np.float32) if np.issubdtype(v.dtype, np.floating) else v
        for k, v in source.read_state(path).items()
    }
    host = jax.device_get(variables)
    if "decoder_FPN_mask_token" in state:
        wanted = torch_names.student_to_torch(host)
        if unlike := sorted(set(state) ^ set(wanted)):
            raise ValueError(
                f"student.init={init!r} is a student of another shape: {len(unlike)} tensors only "
                f"in one of the two, first {unlike[:3]}"
            )
        torch_names.check_shapes(state, wanted, f"student.init={init}")
        layers = tuple(n for n in (1, 2, 3) if f"layer{n}_conv1" in host["params"]["fpn"])
        new = torch_names.student_from_torch(state, layers)
        report = {"used": sorted(state), "missing": [], "unused": []}
    else:
        new, report = torch_names.merge_mae(host, state)
    logging.info(
        "student from %s: %d tensors used, missing %s; licence: %s",
        path,
        len(report["used"]),
        report["missing"] or "none",
        licence,
    )
    facts = {"init": init, "source": path.name, "sha256": source.sha256(path), "licence": licence}
    return jax.tree.map(jnp.asarray, new), facts

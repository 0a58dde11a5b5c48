"""Weights files that mmrjax writes: its own format, and state dicts for PyTorch.

Our format is a .safetensors file whose names are the paths of our variables, such as
"params/encoder/norm/scale", with facts about them as text in the header. PyTorch's are flat state
dicts, .safetensors or .pth. A file appears whole or not at all.
"""

import io
import pathlib
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from mmrjax.models import backbones
from mmrjax.runtime import files
from mmrjax.weights import layouts, mae_names, source, teachers, torch_names
from mmrjax.weights.layouts import State

FORMAT = "mmrjax"  # the header's "format"; PyTorch's files say "pt" there
KINDS = ("student", "encoder", "teacher", "autoencoder")


def write(path: pathlib.Path, variables: dict, facts: dict[str, str]) -> None:
    """Writes variables in our format.

    Args:
      path: a .safetensors file.
      variables: nested dict of arrays.
      facts: "kind" (of KINDS), "arch", and whatever else is worth knowing.
    """
    flat = layouts.contiguous(
        {name: np.asarray(leaf) for name, leaf in layouts.flatten(variables).items()}
    )
    _write_safetensors(path, flat, {"format": FORMAT, **facts})


def read(path: pathlib.Path) -> tuple[dict, dict[str, str]]:
    """(variables as float32 NumPy arrays, facts beside them) of a file in our format.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or not in our format.
    """
    flat, facts = source.read(path)
    if facts.get("format") != FORMAT or facts.get("kind") not in KINDS or "arch" not in facts:
        raise ValueError(f"{path} is not a weights file of mmrjax")
    parents = {parent for name in flat for parent in _parents(name)}
    if both := sorted(parents & flat.keys()):
        raise ValueError(f"{path} is damaged: {both[0]!r} is a tensor and a group of tensors")
    return layouts.unflatten(flat), facts


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def is_ours(path: pathlib.Path) -> bool:
    """Whether a file is in our format."""
    return source.header(path).get("format") == FORMAT


def licence(facts: Mapping[str, str], otherwise: str) -> str:
    """The licence a file states; `otherwise` if mmrjax did not write it, unknown if a run did."""
    return facts.get("licence", source.LOCAL if facts.get("kind") in KINDS else otherwise)


def origin(facts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """{"converted_from": {"source": name, "sha256"}} of a file of ours; {} of any other.

    A file of PyTorch's may say so too, but there the tensors may have changed since.
    """
    name, digest = facts.get("converted_from"), facts.get("converted_from_sha256")
    if facts.get("format") != FORMAT or not (name and digest):
        return {}
    return {"converted_from": {"source": name, "sha256": digest}}


def read_any(path: pathlib.Path) -> tuple[State, dict[str, str]]:
    """The state dict with PyTorch's names in a file of any format, and the facts beside it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged or unknown file.
    """
    if not is_ours(path):
        return source.read(path)
    variables, facts = read(path)
    if facts["kind"] == "teacher":
        arch = backbones.architecture(facts["arch"])
        return teachers.to_torch(variables, arch), facts
    convert = {
        "student": torch_names.student_to_torch,
        "autoencoder": mae_names.to_torch,
        "encoder": torch_names.encoder_to_torch,
    }
    return convert[facts["kind"]](variables), facts


def write_torch(path: pathlib.Path, state: State, facts: dict[str, str], wrapper: str = "") -> None:
    """Writes a state dict for PyTorch.

    Args:
      path: .safetensors, with `facts` in its header; or .pth or .pt, with them in the `_metadata`
        of the state dict, which torch.load(weights_only=True) reads and load_state_dict ignores.
      state: from one of the functions of `torch_names`.
      facts: text.
      wrapper: the entry of a .pth file that holds the state dict, such as "model"; "" for none.

    Raises:
      ValueError: another suffix, or torch is needed and absent.
    """
    if path.suffix == ".safetensors":
        _write_safetensors(path, state, {**facts, "format": "pt"})
        return
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"{path}: unknown suffix; known are .safetensors, .pth and .pt")
    try:
        import torch
    except ImportError as e:
        raise ValueError(
            f"{path} is a PyTorch file: pip install torch, or write .safetensors"
        ) from e
    tensors = OrderedDict((key, torch.tensor(value)) for key, value in state.items())
    tensors._metadata = {source.TORCH_FACTS: facts}
    content = io.BytesIO()
    torch.save({wrapper: tensors} if wrapper else tensors, content)
    files.write_bytes(path, content.getvalue())


def _write_safetensors(path: pathlib.Path, state: State, metadata: dict[str, str]) -> None:
    # Not safetensors' own save_file: only its owner can read what that writes.
    files.write_bytes(path, safetensors.numpy.save(state, metadata=metadata))

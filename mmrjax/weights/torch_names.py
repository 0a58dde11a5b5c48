"""Our networks under PyTorch's names: state dicts of NumPy arrays <-> mmrjax variables.

Neither torch nor a device is needed. Names: the student's are those of the official MMR code (its
encoder is a timm ViT, as MAE's), the teacher's torchvision's. Position tables keep the size they
come with; `merge_student` resizes them to the image size of the student that it fills.
"""

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from mmrjax.models import positions
from mmrjax.weights import layouts, tables
from mmrjax.weights.layouts import Name, State

TABLES = ("pos_embed", "decoder_FPN_pos_embed")
MASK_TOKEN = "decoder_FPN_mask_token"  # only a whole MMR student has it
# Without these an encoder is still one: they keep their initial values.
OPTIONAL = ("cls_token", "pos_embed")
# Tensors of MAE and timm checkpoints that do not belong to the encoder.
_NOT_ENCODER = re.compile(r".*decoder|mask_token$|(head|head_dist|fc_norm|pre_logits)\.")

Report = dict[str, list[str]]
Grid = tables.Grid


# --- students


def encoder_names() -> Iterator[Name]:
    """Yields the names of the ViT: tokens, position table, patch embedding, blocks, norm."""
    yield "cls_token", "params/cls_token", "same"
    yield "pos_embed", "positions/encoder_table", "table"
    yield "patch_embed.proj.weight", "params/patch_kernel", "patch"
    yield "patch_embed.proj.bias", "params/patch_bias", "same"
    yield from transformer_names("blocks", "norm", "params/encoder")


def transformer_names(blocks: str, norm: str, path: str) -> Iterator[Name]:
    """Yields the names of a `vit.Encoder` at `path`, whose blocks and norm PyTorch names so."""
    for torch_part, jax_part in (
        ("attn.qkv", "attn/qkv"),
        ("attn.proj", "attn/proj"),
        ("mlp.fc1", "fc1"),
        ("mlp.fc2", "fc2"),
    ):
        yield f"{blocks}.{{i}}.{torch_part}.weight", f"{path}/blocks/{jax_part}/kernel", "linear"
        yield f"{blocks}.{{i}}.{torch_part}.bias", f"{path}/blocks/{jax_part}/bias", "same"
    for own in ("norm1", "norm2"):
        yield from _norm_names(f"{blocks}.{{i}}.{own}", f"{path}/blocks/{own}")
    yield from _norm_names(norm, f"{path}/norm")


def student_names(layers: tuple[int, ...]) -> Iterator[Name]:
    """Yields the names of a student that reconstructs `layers`."""
    yield from encoder_names()
    yield MASK_TOKEN, "params/mask_token", "same"
    yield "decoder_FPN_pos_embed", "positions/decoder_table", "table"
    ups = {1: (("simfp_2.0", "up1"), ("simfp_2.3", "up2")), 2: (("simfp_3.0", "up1"),), 3: ()}
    for layer in layers:
        for key, name in ups[layer]:
            yield f"{key}.weight", f"params/fpn/layer{layer}_{name}/kernel", "deconv"
            yield f"{key}.bias", f"params/fpn/layer{layer}_{name}/bias", "same"
        if layer == 1:
            yield from _norm_names("simfp_2.1", "params/fpn/layer1_norm")
        for key, name in zip(_CONVOLUTIONS[layer], ("conv1", "conv2"), strict=True):
            path = f"params/fpn/layer{layer}_{name}"
            yield f"{key}.weight", f"{path}/conv/kernel", "conv"
            yield from _norm_names(f"{key}.norm", f"{path}/norm")


# {layer: keys of the 1x1 and of the 3x3 convolution of its pyramid stage}
_CONVOLUTIONS = {
    1: ("simfp_2.4", "simfp_2.5"),
    2: ("simfp_3.1", "simfp_3.2"),
    3: ("simfp_4.0", "simfp_4.1"),
}


def _norm_names(key: str, path: str) -> Iterator[Name]:
    yield f"{key}.weight", f"{path}/scale", "same"
    yield f"{key}.bias", f"{path}/bias", "same"


def student_channels(state: Mapping[str, np.ndarray]) -> dict[int, int]:
    """{layer: channels} of the pyramid stages in an official state; all three if there is none."""
    sizes = {n: state.get(f"{key}.norm.bias") for n, (_, key) in _CONVOLUTIONS.items()}
    stages = [n for n in sizes if any(k.startswith(f"simfp_{n + 1}.") for k in state)]
    return {n: 1 if sizes[n] is None else sizes[n].size for n in stages or sizes}


def student_from_torch(state: State, layers: tuple[int, ...] = (1, 2, 3)) -> dict:
    """Official MMR state dict -> {"params", "positions"} of `models.student.MaskedStudent`.

    Raises:
      ValueError: naming the keys that `state` lacks.
    """
    return layouts.from_torch(state, student_names(layers), "an MMR student")


def student_to_torch(variables: dict, grid: Grid | None = None) -> State:
    """Variables of `models.student.MaskedStudent` -> state dict with the official MMR keys.

    Args:
      variables: those of a student of any layers.
      grid: patches per column and per row of its images; None if both are equal.
    """
    return layouts.contiguous(_student_views(_with_official_table(variables, grid)))


def encoder_from_torch(state: State) -> dict:
    """MAE or timm state dict -> the encoder's part of a student's variables.

    Decoder and classifier heads are ignored, see `encoder_part`; class token and position table
    may be missing.

    Raises:
      ValueError: naming the keys that `state` lacks.
    """
    names = [row for row in encoder_names() if row[0] in state or row[0] not in OPTIONAL]
    return layouts.from_torch(state, names, "a ViT encoder")


def encoder_to_torch(variables: dict, grid: Grid | None = None) -> State:
    """The encoder in a student's variables -> state dict of a timm ViT without a head.

    `grid` as in `student_to_torch`.
    """
    return layouts.contiguous(_encoder_views(_with_official_table(variables, grid)))


def encoder_part(state: State) -> State:
    """The part of a MAE checkpoint that the official code takes, less the heads of classifiers.

    It drops every key that contains "decoder", and the key "mask_token".
    """
    return {key: value for key, value in state.items() if not _NOT_ENCODER.match(key)}


def is_mae(state: State) -> bool:
    """Whether a ViT is MAE's: it has a decoder and mask token, or MAE's fixed position table.

    The ViTs of timm's authors learn their table; the MAE weights that its hub also offers keep it.
    Never true of a whole MMR student.
    """
    if MASK_TOKEN in state or "mask_token" in state:
        return MASK_TOKEN not in state
    table = state.get("pos_embed")
    if table is None or table.ndim != 3 or table.shape[2] % 4:
        return False
    side = math.isqrt(max(table.shape[1] - 1, 0))
    fixed = positions.sincos_2d(table.shape[2], (side, side))
    return table[0].shape == fixed.shape and np.allclose(table[0], fixed, atol=1e-3)


def _student_views(variables: dict) -> State:
    return layouts.to_torch(variables, student_names(_layers(variables)), "an MMR student")


def _encoder_views(variables: dict) -> State:
    flat = layouts.flatten(variables)
    names = [row for row in encoder_names() if row[1] in flat or row[0] not in OPTIONAL]
    return layouts.to_torch(variables, names, "a ViT encoder")


def _layers(variables: dict) -> tuple[int, ...]:
    flat = layouts.flatten(variables)
    return tuple(n for n in _CONVOLUTIONS if f"params/fpn/layer{n}_conv1/conv/kernel" in flat)


def check_student(state: State, like: dict, whole: bool, what: str) -> None:
    """Raises ValueError unless a state dict fits a student, naming tensors and both shapes.

    Args:
      state: a whole MMR student; or a MAE or timm checkpoint.
      like: variables of the student. Position tables may have other numbers of rows.
      whole: whether everything has to fit, or the encoder alone.
      what: begins the message.
    """
    if whole:
        given, wanted, optional = state, _student_views(like), ()
    else:
        given, wanted, optional = encoder_part(state), _encoder_views(like), OPTIONAL
    for key in given.keys() & wanted.keys() & set(TABLES):
        if given[key].ndim == 3:  # as many rows as there are
            shape = (1, given[key].shape[1], wanted[key].shape[2])
            wanted[key] = np.broadcast_to(wanted[key][:, :1], shape)
    layouts.check_fit(given, wanted, what, optional)


def merge_student(variables: dict, state: State, grid: Grid | None = None) -> tuple[dict, Report]:
    """Puts a state dict into freshly initialised student variables.

    A whole MMR student replaces everything, a MAE or timm checkpoint the encoder: mask token and
    pyramid keep their initial values. The encoder's position table is resized to the student's
    image size as torch does; the decoder's is never resized, but drawn for each image size.

    Args:
      variables: from `MaskedStudent.init`.
      state: with official MMR, MAE or timm names.
      grid: patches per column and per row of the student's images; None if both are equal.

    Returns:
      (new variables, {"used", "missing", "unused", "replaced"}: lists of names; "replaced" are
      position tables that were resized or drawn anew).

    Raises:
      ValueError: naming tensors that are missing or do not fit, with both shapes.
    """
    is_student = MASK_TOKEN in state
    what = "not a student of this shape" if is_student else "not an encoder of this shape"
    check_student(state, variables, is_student, what)
    given = state if is_student else encoder_part(state)
    merged = layouts.from_torch(
        {**_student_views(variables), **given}, student_names(_layers(variables)), "an MMR student"
    )
    before, after = variables["positions"], dict(merged["positions"])
    if "pos_embed" in given:
        grid = grid or tables.square_grid(before["encoder_table"])
        after["encoder_table"] = tables.fit_table(after["encoder_table"], grid)
    if after["decoder_table"].shape != before["decoder_table"].shape:
        after["decoder_table"] = np.asarray(before["decoder_table"])
    report = {
        **usage(state, given),
        "missing": [key for key in OPTIONAL if key not in given],
        "replaced": [name for name in after if after[name] is not merged["positions"][name]],
    }
    return {**merged, "positions": after}, report


def usage(state: State, used: State) -> Report:
    """{"used", "unused"}: the keys of a state dict."""
    return {"used": list(used), "unused": [key for key in state if key not in used]}


def _with_official_table(variables: dict, grid: Grid | None) -> dict:
    flat = layouts.flatten(variables)
    if (table := flat.get("positions/encoder_table")) is None:
        return variables
    official = tables.official_table(np.asarray(table), grid)
    return layouts.unflatten({**flat, "positions/encoder_table": official})

"""Names and layouts: PyTorch state dicts <-> mmrjax variables. The only place that knows NCHW.

Everything works on dicts of NumPy arrays, so neither torch nor a device is needed. Layouts:
linear (out, in) -> (in, out); convolution OIHW -> HWIO; transposed convolution (in, out, kh, kw)
-> (in, kh, kw, out); patch embedding OIHW -> (kh * kw * in, out); stacked blocks [depth, ...].
"""

from collections.abc import Iterator

import numpy as np

from mmrjax.models import resnet

State = dict[str, np.ndarray]
BATCH_NORM_EPSILON = 1e-5

_TO_JAX = {
    "same": lambda x: x,
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(2, 3, 1, 0),
    "deconv": lambda x: x.transpose(0, 2, 3, 1),
    "patch": lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
}
_TO_TORCH = {
    "same": lambda x: x,
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(3, 2, 0, 1),
    "deconv": lambda x: x.transpose(0, 3, 1, 2),
}


def student_names(layers: tuple[int, ...]) -> Iterator[tuple[str, str, str]]:
    """Yields (official MMR key, variable path, layout); "{i}" stands for the block number."""
    yield "cls_token", "params/cls_token", "same"
    yield "decoder_FPN_mask_token", "params/mask_token", "same"
    yield "pos_embed", "positions/encoder_table", "table"
    yield "decoder_FPN_pos_embed", "positions/decoder_table", "table"
    yield "patch_embed.proj.weight", "params/patch_kernel", "patch"
    yield "patch_embed.proj.bias", "params/patch_bias", "same"
    block = "params/encoder/blocks"
    for torch_part, jax_part in (
        ("attn.qkv", "attn/qkv"),
        ("attn.proj", "attn/proj"),
        ("mlp.fc1", "fc1"),
        ("mlp.fc2", "fc2"),
    ):
        yield f"blocks.{{i}}.{torch_part}.weight", f"{block}/{jax_part}/kernel", "linear"
        yield f"blocks.{{i}}.{torch_part}.bias", f"{block}/{jax_part}/bias", "same"
    for norm in ("norm1", "norm2"):
        yield from _norm_names(f"blocks.{{i}}.{norm}", f"{block}/{norm}")
    yield from _norm_names("norm", "params/encoder/norm")
    yield from _pyramid_names(layers)


def _pyramid_names(layers: tuple[int, ...]) -> Iterator[tuple[str, str, str]]:
    ups = {1: (("simfp_2.0", "up1"), ("simfp_2.3", "up2")), 2: (("simfp_3.0", "up1"),), 3: ()}
    convs = {
        1: (("simfp_2.4", "conv1"), ("simfp_2.5", "conv2")),
        2: (("simfp_3.1", "conv1"), ("simfp_3.2", "conv2")),
        3: (("simfp_4.0", "conv1"), ("simfp_4.1", "conv2")),
    }
    for layer in layers:
        for key, name in ups[layer]:
            yield f"{key}.weight", f"params/fpn/layer{layer}_{name}/kernel", "deconv"
            yield f"{key}.bias", f"params/fpn/layer{layer}_{name}/bias", "same"
        if layer == 1:
            yield from _norm_names("simfp_2.1", "params/fpn/layer1_norm")
        for key, name in convs[layer]:
            path = f"params/fpn/layer{layer}_{name}"
            yield f"{key}.weight", f"{path}/conv/kernel", "conv"
            yield from _norm_names(f"{key}.norm", f"{path}/norm")


def _norm_names(key: str, path: str) -> Iterator[tuple[str, str, str]]:
    yield f"{key}.weight", f"{path}/scale", "same"
    yield f"{key}.bias", f"{path}/bias", "same"


def student_from_torch(state: State, layers: tuple[int, ...] = (1, 2, 3)) -> dict:
    """Official MMR state dict -> {"params", "positions"} of `models.student.MaskedStudent`.

    Raises:
      ValueError: naming the keys that `state` lacks.
    """
    depth = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)
    variables: dict = {}
    missing = []
    for key, path, layout in student_names(layers):
        keys = [key.format(i=i) for i in range(depth)] if "{i}" in key else [key]
        missing += [k for k in keys if k not in state]
        if missing:
            continue
        if layout == "table":
            value = state[key][0]
        else:
            value = np.stack([_TO_JAX[layout](state[k]) for k in keys])
            value = value if "{i}" in key else value[0]
        _set(variables, path, np.ascontiguousarray(value))
    if missing:
        raise ValueError(f"not an MMR student: {len(missing)} tensors missing, first {missing[:5]}")
    return variables


def student_to_torch(variables: dict, patch: int = 16) -> State:
    """Variables of `models.student.MaskedStudent` -> state dict with the official MMR keys."""
    layers = tuple(
        layer for layer in (1, 2, 3) if f"layer{layer}_conv1" in variables["params"]["fpn"]
    )
    state = {}
    for key, path, layout in student_names(layers):
        value = np.asarray(_get(variables, path))
        if layout == "table":
            state[key] = value[None]
        elif layout == "patch":
            state[key] = value.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
        elif "{i}" in key:
            state |= {key.format(i=i): _TO_TORCH[layout](v) for i, v in enumerate(value)}
        else:
            state[key] = _TO_TORCH[layout](value)
    return {key: np.ascontiguousarray(value) for key, value in state.items()}


def merge_mae(variables: dict, state: State) -> tuple[dict, dict[str, list[str]]]:
    """Puts the encoder of a MAE checkpoint into freshly initialised student variables.

    As the official code: every key containing "decoder" and the key "mask_token" is dropped, the
    rest is used where it fits. Mask token and pyramid keep their initial values.

    Args:
      variables: from `MaskedStudent.init`.
      state: MAE state dict (timm names).

    Returns:
      (new variables, {"used", "missing", "unused"}: lists of keys).

    Raises:
      ValueError: naming tensors whose shape differs, with both shapes.
    """
    encoder = {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}
    target = student_to_torch(variables)
    wanted = [k for k in target if "decoder" not in k and not k.startswith("simfp")]
    used = [k for k in wanted if k in encoder]
    # The stored table is the sine-cosine one of 224 px; other image sizes keep their resized one.
    used = [k for k in used if k != "pos_embed" or encoder[k].shape == target[k].shape]
    check_shapes({k: encoder[k] for k in used}, target, "MAE checkpoint")
    report = {
        "used": used,
        "missing": [k for k in wanted if k not in encoder],
        "unused": sorted(set(state) - set(used)),
    }
    missing = [k for k in report["missing"] if k not in ("pos_embed", "cls_token")]
    left_over = [k for k in report["unused"] if k.startswith("blocks.")]
    if missing or left_over:
        raise ValueError(
            f"not an encoder of this depth: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(left_over)} of further blocks {left_over[:3]}"
        )
    merged = {**target, **{k: encoder[k].astype(np.float32) for k in used}}
    layers = tuple(
        layer for layer in (1, 2, 3) if f"layer{layer}_conv1" in variables["params"]["fpn"]
    )
    return student_from_torch(merged, layers), report


def check_shapes(given: State, wanted: State, what: str) -> None:
    """Raises ValueError with name, given and expected shape of every tensor that does not fit."""
    wrong = [
        f"{k}: given {tuple(given[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in given
        if k in wanted and given[k].shape != wanted[k].shape
    ]
    if wrong:
        raise ValueError(
            f"{what} does not fit: {len(wrong)} tensors of another shape: " + "; ".join(wrong[:4])
        )


def teacher_names(arch: resnet.Architecture) -> Iterator[tuple[str, str, str]]:
    """Yields (convolution key, BatchNorm key, variable path) of stem and layers 1-3."""
    yield "conv1", "bn1", "conv1"
    last = 4 if arch.bottleneck else 3
    for layer, blocks in enumerate(arch.blocks, start=1):
        for i in range(blocks):
            torch, jax = f"layer{layer}.{i}", f"layer{layer}_{i}"
            for c in range(1, last):
                yield f"{torch}.conv{c}", f"{torch}.bn{c}", f"{jax}/conv{c}"
            if i == 0 and (layer > 1 or arch.channels[0] != arch.stem):
                yield f"{torch}.downsample.0", f"{torch}.downsample.1", f"{jax}/downsample"


def teacher_from_torch(state: State, arch: resnet.Architecture) -> dict:
    """Torchvision ResNet state dict -> {"params"} of `models.resnet.ResNet`, BatchNorm folded.

    w' = w * gamma / sqrt(var + 1e-5), b' = beta - mean * gamma / sqrt(var + 1e-5), in float32.
    layer4 and fc are ignored.

    Raises:
      ValueError: naming missing tensors, or tensors whose shape belongs to another architecture.
    """
    names = list(teacher_names(arch))
    parts = ("weight", "bias", "running_mean", "running_var")
    wanted = [f"{conv}.weight" for conv, _, _ in names]
    wanted += [f"{bn}.{part}" for _, bn, _ in names for part in parts]
    missing = [k for k in wanted if k not in state]
    extra = [k for k in state if k.startswith(("layer1", "layer2", "layer3")) and k not in wanted]
    extra = [k for k in extra if not k.endswith("num_batches_tracked")]
    if missing or extra:
        raise ValueError(
            f"weights of another architecture: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(extra)} unexpected {extra[:3]}"
        )
    variables: dict = {}
    for conv, bn, path in names:
        gamma, beta, mean, var = (state[f"{bn}.{part}"].astype(np.float32) for part in parts)
        scale = gamma / np.sqrt(var + np.float32(BATCH_NORM_EPSILON))
        kernel = state[f"{conv}.weight"].astype(np.float32).transpose(2, 3, 1, 0) * scale
        _set(variables, f"params/{path}/kernel", np.ascontiguousarray(kernel))
        _set(variables, f"params/{path}/bias", beta - mean * scale)
    return variables


def _set(tree: dict, path: str, value: np.ndarray) -> None:
    *parents, leaf = path.split("/")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = value


def _get(tree: dict, path: str) -> np.ndarray:
    for name in path.split("/"):
        tree = tree[name]
    return tree

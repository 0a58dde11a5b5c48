"""Frozen ViTs under their authors' names: state dicts <-> variables of `models.vit_backbone.ViT`.

`to_torch` writes the names of the authors' code (timm for ViT and DeiT, facebookresearch for DINO,
DINOv2 and DINOv3). `from_torch` also reads timm's names of DINOv2 and DINOv3, and DINOv2's training
checkpoints, whose blocks are numbered blocks.<chunk>.<number>. Nothing is told by shape alone.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np

from mmrjax.models import vit_backbone
from mmrjax.weights import layouts
from mmrjax.weights.layouts import Name, State

# Classifier heads, projectors of the pretraining, and masks that our layout makes needless.
_UNUSED = re.compile(
    r"(head|head_dist|fc_norm|pre_logits|projectors|local_cls_norm)\.|.*\.bias_mask$"
)
_CHUNKED = re.compile(r"blocks\.\d+\.(\d+\.)")
INITIAL_DEVIATION = 0.02  # of weights and tokens, as all the authors draw them


def names(arch: vit_backbone.Architecture) -> list[Name]:
    """One row (key, path of the variable, layout) per tensor."""
    rows = [
        ("cls_token", "params/class_token", "table"),
        ("patch_embed.proj.weight", "params/patch/kernel", "patch"),
        ("patch_embed.proj.bias", "params/patch/bias", "same"),
        ("norm.weight", "params/norm/scale", "same"),
        ("norm.bias", "params/norm/bias", "same"),
    ]
    if arch.table:
        rows.append(("pos_embed", "params/positions", "table"))
    else:
        rows.append(("rope_embed.periods", "params/periods", "same"))
    if arch.registers:
        rows.append((_registers(arch), "params/registers", "table"))
    if arch.masked:
        rows.append(("mask_token", "params/mask_token", "same"))
    for i in range(arch.depth):
        rows += [(f"blocks.{i}.{k}", f"params/block_{i}/{v}", how) for k, v, how in _block(arch)]
    return rows


def _registers(arch: vit_backbone.Architecture) -> str:
    return "register_tokens" if arch.table else "storage_tokens"


def _block(arch: vit_backbone.Architecture) -> list[Name]:
    inner, outer = ("w12", "w3") if arch.swiglu else ("fc1", "fc2")
    linear = {
        "attn.qkv": "qkv",
        "attn.proj": "proj",
        f"mlp.{inner}": "fc1",
        f"mlp.{outer}": "fc2",
    }
    rows = [
        row
        for key, path in linear.items()
        for row in (
            (f"{key}.weight", f"{path}/kernel", "linear"),
            (f"{key}.bias", f"{path}/bias", "same"),
        )
    ]
    for norm in ("norm1", "norm2"):
        rows += [
            (f"{norm}.weight", f"{norm}/scale", "same"),
            (f"{norm}.bias", f"{norm}/bias", "same"),
        ]
    if arch.scaled:
        rows += [("ls1.gamma", "scale1", "same"), ("ls2.gamma", "scale2", "same")]
    return rows


def from_torch(state: State, arch: vit_backbone.Architecture) -> dict:
    """A state dict -> {"params"} of `models.vit_backbone.ViT`, float32.

    Raises:
      ValueError: naming tensors that are missing, unexpected or of another shape, with both shapes.
    """
    what = "weights of another architecture"
    check(state, arch, what)
    return layouts.from_torch(_translated(used(state), arch), names(arch), what)


def to_torch(variables: dict, arch: vit_backbone.Architecture) -> State:
    """Variables of `models.vit_backbone.ViT` -> state dict under the authors' names.

    Raises:
      ValueError: naming the variables that are absent.
    """
    return layouts.contiguous(_views(variables, arch))


def check(state: State, arch: vit_backbone.Architecture, what: str) -> None:
    """Raises ValueError unless a state dict fits a teacher; the message begins with `what`."""
    rows = layouts.to_torch(_hollow(arch), names(arch), what)
    layouts.check_fit(_translated(used(state), arch), rows, what)


def used(state: State) -> State:
    """The used part of a ViT: without heads, projectors and masks of biases."""
    return {key: value for key, value in state.items() if not _UNUSED.match(key)}


def random(arch: vit_backbone.Architecture, seed: int) -> dict:
    """Normal weights and tokens of deviation 0.02, no biases, norms and scales 1; float32."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf: np.ndarray) -> np.ndarray:
        name = path[-1].key
        if name in ("scale", "scale1", "scale2"):
            return np.ones(leaf.shape, np.float32)
        if name in ("bias", "mask_token"):
            return np.zeros(leaf.shape, np.float32)
        if name == "periods":
            return np.asarray(vit_backbone.rotary_periods(len(leaf)))
        return (rng.standard_normal(leaf.shape) * INITIAL_DEVIATION).astype(np.float32)

    return jax.tree.map_with_path(draw, _hollow(arch))


def _hollow(arch: vit_backbone.Architecture) -> dict:
    """The variables of all blocks, without values."""
    arch, image = dataclasses.replace(arch, normed=True), jnp.zeros((1, arch.patch, arch.patch, 3))
    return layouts.hollow(vit_backbone.ViT(arch, (arch.depth,)).init, image)


def _views(variables: dict, arch: vit_backbone.Architecture) -> State:
    """The state dict under the authors' names; DINOv3's code has two tensors for SwiGLU's `fc1`."""
    state = layouts.to_torch(variables, names(arch), "a teacher of this architecture")
    if arch.table:
        return state
    for i in range(arch.depth):
        block = f"blocks.{i}."
        mask = np.repeat(np.float32([1, 0, 1]), arch.width)
        state[f"{block}attn.qkv.bias_mask"] = mask
        if arch.swiglu:
            for part in ("weight", "bias"):
                halves = np.split(state.pop(f"{block}mlp.w12.{part}"), 2)
                state |= {f"{block}mlp.w{n}.{part}": half for n, half in enumerate(halves, 1)}
    return state


def _translated(state: State, arch: vit_backbone.Architecture) -> State:
    """A state dict under any of the known names -> the names of `names`."""
    state = {_CHUNKED.sub(r"blocks.\1", key): value for key, value in state.items()}
    if arch.masked and "mask_token" not in state:  # timm drops it
        state["mask_token"] = np.zeros((1, arch.width), np.float32)
    return _from_dino2(state, arch) if arch.table else _from_dino3(state, arch)


def _from_dino2(state: State, arch: vit_backbone.Architecture) -> State:
    """Names and layout of timm's DINOv2 -> the official ones; others stay as they are."""
    if "reg_token" in state:  # timm adds the class token's position to the class token
        state["register_tokens"] = state.pop("reg_token")
        if "pos_embed" in state:
            table = state["pos_embed"]
            state["pos_embed"] = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    if arch.swiglu:
        for old, new in ((".mlp.fc1.", ".mlp.w12."), (".mlp.fc2.", ".mlp.w3.")):
            state = {key.replace(old, new): value for key, value in state.items()}
    return state


def _from_dino3(state: State, arch: vit_backbone.Architecture) -> State:
    """Names of DINOv3, official or timm's -> those of `names`; the keys' bias is 0 in both."""
    renamed = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    if arch.swiglu:
        renamed |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3"}
    for old, new in renamed.items():
        pattern = re.compile(rf"(^|\.){re.escape(old)}(\.|$)")
        state = {pattern.sub(rf"\g<1>{new}\2", key): value for key, value in state.items()}
    quarter = arch.width // arch.heads // 4
    state.setdefault("rope_embed.periods", np.asarray(vit_backbone.rotary_periods(quarter)))
    for i in range(arch.depth):
        block, none = f"blocks.{i}.", np.zeros(arch.width, np.float32)
        bias = state.get(f"{block}attn.qkv.bias", np.zeros(3 * arch.width, np.float32))
        q = state.pop(f"{block}attn.q_bias", bias[: arch.width])
        v = state.pop(f"{block}attn.v_bias", bias[2 * arch.width :])
        state[f"{block}attn.qkv.bias"] = np.concatenate([q, none, v])
        for part in ("weight", "bias"):
            halves = [state.pop(f"{block}mlp.w{n}.{part}", None) for n in (1, 2)]
            if halves[0] is not None and halves[1] is not None:
                state[f"{block}mlp.w12.{part}"] = np.concatenate(halves)
    return state

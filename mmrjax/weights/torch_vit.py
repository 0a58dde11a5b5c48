"""Frozen ViTs in PyTorch, under their authors' names, for ONNX; needs the torch extra.

A network is made for chosen sizes of images: position tables are brought to their grids when the
network is built, by `models.positions`. Written from the same facts as `models.vit_backbone`.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmrjax.models import positions, vit_backbone


class Scale(nn.Module):
    """LayerScale: a factor for each channel."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, d] -> [b, n, d]."""
        return x * self.gamma


class Block(nn.Module):
    """A block of `vit_backbone.ViT`."""

    def __init__(self, arch: vit_backbone.Architecture):
        super().__init__()
        d, hidden = arch.width, arch.hidden or 4 * arch.width
        self.heads = arch.heads
        self.norm1, self.norm2 = (nn.LayerNorm(d, eps=arch.epsilon) for _ in range(2))
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(d, d)})
        self.ls1, self.ls2 = (Scale(d) if arch.scaled else nn.Identity() for _ in range(2))
        if not arch.swiglu:
            parts = {"fc1": nn.Linear(d, hidden), "fc2": nn.Linear(hidden, d)}
        elif arch.table:
            parts = {"w12": nn.Linear(d, 2 * hidden), "w3": nn.Linear(hidden, d)}
        else:
            parts = {name: nn.Linear(d, hidden) for name in ("w1", "w2")}
            parts["w3"] = nn.Linear(hidden, d)
        self.mlp = nn.ModuleDict(parts)

    def forward(self, x: torch.Tensor, rotation) -> torch.Tensor:
        """[b, n, d] -> [b, n, d]; `rotation`: (cosines, sines) [patches, head / 2], or None."""
        b, n, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, n, d / heads]
        if rotation is not None:
            q, k = (_rotate(z, *rotation) for z in (q, k))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.ls1(self.attn["proj"](y))
        return x + self.ls2(self._feed_forward(self.norm2(x)))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        if "fc1" in self.mlp:
            return self.mlp["fc2"](F.gelu(self.mlp["fc1"](x)))
        if "w12" in self.mlp:
            gate, x = self.mlp["w12"](x).chunk(2, dim=-1)
        else:
            gate, x = self.mlp["w1"](x), self.mlp["w2"](x)
        return self.mlp["w3"](F.silu(gate) * x)


class ViT(nn.Module):
    """The maps of chosen blocks for images of known sizes.

    Args:
      state: from `vit_names.to_torch`.
      arch: the architecture.
      taps: blocks, from 1.
      sizes: (height, width) of the images that it will see, px.
    """

    def __init__(
        self,
        state: Mapping[str, np.ndarray],
        arch: vit_backbone.Architecture,
        taps: Sequence[int],
        sizes: Sequence[tuple[int, int]],
    ):
        super().__init__()
        self.taps, self.patch, self.normed = tuple(taps), arch.patch, arch.normed
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, arch.width, arch.patch, stride=arch.patch)}
        )
        self.blocks = nn.ModuleList(Block(arch) for _ in range(max(taps)))
        self.norm = nn.LayerNorm(arch.width, eps=arch.epsilon)
        own = {key: torch.tensor(state[key]) for key in self.state_dict()}
        self.load_state_dict(own, strict=True)
        extra = state["cls_token"][0]
        for h, w in {*sizes}:
            grid = h // arch.patch, w // arch.patch
            name = f"{grid[0]}x{grid[1]}"
            if arch.table:
                table = jnp.asarray(state["pos_embed"][0, 1:])
                table = np.array(positions.resized(table, arch.table, grid, arch.positions))
                self.register_buffer(f"table_{name}", torch.from_numpy(table))
            else:
                angles = vit_backbone.rotary_angles(grid, state["rope_embed.periods"])
                angles = torch.from_numpy(np.array(angles))
                self.register_buffer(f"cosines_{name}", torch.cos(angles))
                self.register_buffer(f"sines_{name}", torch.sin(angles))
        if arch.table:
            extra = extra + state["pos_embed"][0, :1]
        if arch.registers:
            registers = state["register_tokens" if arch.table else "storage_tokens"][0]
            extra = np.concatenate([extra, registers])
        self.register_buffer("extra", torch.tensor(extra))
        self.has_table = bool(arch.table)
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        """Normalised [b, 3, h, w] -> {block: [b, d, h / patch, w / patch]}."""
        x = self.patch_embed["proj"](images)
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        name, rotation = f"{rows}x{columns}", None
        x = x.flatten(2).transpose(1, 2)
        if self.has_table:
            x = x + getattr(self, f"table_{name}")
        else:
            rotation = getattr(self, f"cosines_{name}"), getattr(self, f"sines_{name}")
        x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], dim=1)
        maps = {}
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, rotation)
            if number in self.taps:
                y = (self.norm(x) if self.normed else x)[:, len(self.extra) :]
                maps[number] = y.transpose(1, 2).unflatten(2, (rows, columns))
        return maps


def _rotate(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotates channels (i, i + c / 2) of the patches, the last of the tokens [b, heads, n, c]."""
    first = x.shape[2] - len(cosines)
    a, b = x[:, :, first:].chunk(2, dim=-1)
    turned = torch.cat([a * cosines - b * sines, b * cosines + a * sines], dim=-1)
    return torch.cat([x[:, :, :first], turned], dim=2)

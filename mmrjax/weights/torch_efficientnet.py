"""EfficientNet-lite in PyTorch, under timm's names, for ONNX and the benchmark; needs torch."""

import torch
from torch import nn
from torch.nn import functional as F

from mmrjax.models import efficientnet
from mmrjax.weights import efficientnet_names as names


class Convolution(nn.Conv2d):
    """A convolution with TensorFlow's padding "SAME", which is asymmetric at stride 2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, c, h, w] -> [b, out, ceil(h / stride), ceil(w / stride)]."""
        pads = []
        for side, size, step in zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True):
            missing = max((-(-side // step) - 1) * step + size - side, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(x, pads))


class EfficientNet(nn.Module):
    """A frozen EfficientNet-lite, tapped after its stages.

    Args:
      arch: which member of the family.
      taps: {layer: stage}; the maps are called "layer1", "layer2", ….
      state: from `efficientnet_names.to_torch`.
    """

    def __init__(self, arch: efficientnet.Architecture, taps: dict[int, int], state: dict):
        super().__init__()
        self.taps = {stage: f"layer{layer}" for layer, stage in taps.items()}
        self.blocks = [
            (stage, [f"stage{stage}_{i}" for i in range(count)])
            for stage, count in enumerate(arch.blocks[: max(self.taps)], start=1)
        ]
        used = {block for _, blocks in self.blocks for block in blocks} | {"stem"}
        self.parts = nn.ModuleDict()
        for conv, bn, path in names.names(arch):
            block, _, part = path.partition("/")
            if block in used:
                self.parts[path.replace("/", "_")] = _convolution(
                    state[f"{conv}.weight"],
                    state[f"{bn}.bias"],
                    2 if block == "stem" else _stride(block, part),
                )
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """[b, 3, h, w] -> {"layer<n>": [b, c, h / stride, w / stride]}."""
        x, maps = F.relu6(self.parts["stem"](images)), {}
        for stage, blocks in self.blocks:
            for block in blocks:
                y = x
                if f"{block}_expand" in self.parts:
                    y = F.relu6(self.parts[f"{block}_expand"](y))
                y = F.relu6(self.parts[f"{block}_depthwise"](y))
                y = self.parts[f"{block}_project"](y)
                x = x + y if x.shape == y.shape else y
            if stage in self.taps:
                maps[self.taps[stage]] = x
        return maps


def _stride(block: str, part: str) -> int:
    """The stride of a part of the block "stage<n>_<i>"."""
    stage, i = block.removeprefix("stage").split("_")
    first = part == "depthwise" and i == "0"
    return efficientnet.STRIDES[int(stage) - 1] if first else 1


def _convolution(weight, bias, stride: int) -> Convolution:
    """The convolution of folded weights [out, in, kh, kw]; depthwise if `in` is 1."""
    weight, bias = torch.tensor(weight), torch.tensor(bias)
    out, inner, *size = weight.shape
    groups = out if inner == 1 else 1
    conv = Convolution(inner * groups, out, size, stride, groups=groups)
    conv.weight.data, conv.bias.data = weight, bias
    return conv

"""A PyTorch twin of MMR (arXiv 2304.02216): the yardstick for the numbers and the speed of mmrjax.

Written from the description of the method, with the tensor names of the official code, so that the
same safetensors files load in both. It needs the torch extra and imports nothing of mmrjax: whoever
leaves may copy this file alone. Tensors are NCHW. Shapes: b batch, n patches, k kept patches,
d width, c channels, h w image, g grid side.

scripts/score_in_torch.py scores an image with weights that `python -m mmrjax.convert to-torch` has
written; weights/torch_scorers.py makes whole scorers of the networks, for ONNX and the benchmark.
"""

import io
import math
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors import safe_open
from scipy import ndimage
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WIDE_RESNET = (256, 512, 1024)  # channels of the paper's teacher, wide_resnet50_2
LAYERS = ("layer1", "layer2", "layer3")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # of pictures; Pillow opens no other
# name: (bottleneck, blocks in layer1..4, width of a bottleneck relative to its planes)
ARCHITECTURES = {
    "resnet18": (False, (2, 2, 2, 2), 1),
    "resnet34": (False, (3, 4, 6, 3), 1),
    "resnet50": (True, (3, 4, 6, 3), 1),
    "resnet101": (True, (3, 4, 23, 3), 1),
    "wide_resnet50_2": (True, (3, 4, 6, 3), 2),
    "wide_resnet101_2": (True, (3, 4, 23, 3), 2),
}


class ResidualBlock(nn.Module):
    """Basic (two 3x3) or bottleneck (1x1, 3x3, 1x1) block; the stride sits on the first 3x3."""

    def __init__(self, inputs: int, planes: int, stride: int, bottleneck: bool, widen: int):
        super().__init__()
        width = planes * widen
        outputs = planes * 4 if bottleneck else planes
        plan = [(inputs, planes, 3, stride), (planes, planes, 3, 1)]  # in, out, kernel, stride
        if bottleneck:
            plan = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.depth = len(plan)
        for i, (cin, cout, k, step) in enumerate(plan, start=1):
            self.add_module(f"conv{i}", nn.Conv2d(cin, cout, k, step, padding=k // 2, bias=False))
            self.add_module(f"bn{i}", nn.BatchNorm2d(cout))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, inputs, h, w] -> [b, outputs, h / stride, w / stride], after the last ReLU."""
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y, inplace=True) if i < self.depth else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class ResNetTeacher(nn.Module):
    """Frozen ResNet (torchvision v1.5 layout and key names); always in evaluation mode.

    `planes` are the base widths of layer1, layer2, ... (a bottleneck puts out four times as many).
    `stages` 3 stops after layer3; 4 also runs the unused layer4, as the official code does.
    """

    def __init__(self, arch="resnet18", stem=None, planes=None, stages=3):
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown teacher {arch!r}; available: {sorted(ARCHITECTURES)}")
        bottleneck, depths, widen = ARCHITECTURES[arch]
        stem = stem or 64
        planes = planes or tuple(stem * 2**i for i in range(4))
        self.stages = stages
        self.channels = tuple(p * (4 if bottleneck else 1) for p in planes[:3])
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        inputs = stem
        for i, (depth, width) in enumerate(zip(depths[:stages], planes, strict=False), start=1):
            layer = nn.Sequential()
            for j in range(depth):
                stride = 2 if i > 1 and j == 0 else 1
                layer.append(ResidualBlock(inputs, width, stride, bottleneck, widen))
                inputs = width * 4 if bottleneck else width
            self.add_module(f"layer{i}", layer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ResNetTeacher":
        """Ignores `mode`: batch norm always uses its running statistics."""
        return super().train(False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """[b, 3, h, w] -> layer1 [b, c1, h/4, w/4], layer2 [b, c2, h/8, w/8], layer3 (h/16)."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, 2, padding=1)
        maps = {}
        for i in range(1, self.stages + 1):
            x = maps[f"layer{i}"] = getattr(self, f"layer{i}")(x)
        return {name: maps[name] for name in LAYERS}


def pair(size) -> tuple[int, int]:
    """(height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def sincos_table(width: int, grid) -> torch.Tensor:
    """Fixed position table [1, 1 + h * w, width], float32; the row of the cls token is zero.

    `grid` is the number of patches per column and per row, or one number for both.

    The first half of the dimensions encodes the column of a patch, the second half its row; either
    half is [sin(p w_i), cos(p w_i)] with w_i = 10000^(-i / (width / 4)).
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    rows, columns = np.indices(pair(grid)).reshape(2, -1)
    angles = [p[:, None] * omega for p in (columns, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.pad(table, ((1, 0), (0, 0))).astype(np.float32))[None]


def resize_table(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Position table [1, 1 + m^2, d] -> [1, 1 + h * w, d]: bicubic (a = -0.75), no antialias.

    A table whose rows are no square number has the grid already.
    """
    m = math.isqrt(table.shape[1] - 1)
    if (m, m) == grid or m * m != table.shape[1] - 1:
        return table
    patches = table[:, 1:].transpose(1, 2).reshape(1, -1, m, m)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def kept_tokens(tokens: int, mask_ratio: float) -> int:
    """Number of visible tokens; truncated in float arithmetic, like the official code."""
    return int(tokens * (1 - mask_ratio))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then an exact-GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        qkv, proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": proj})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, d] -> [b, n, d]."""
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # [b, heads, n, d / heads]
        x = x + self.attn["proj"](y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of every pixel of [b, c, h, w]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, c, h, w] -> [b, c, h, w]."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """Convolution without bias, followed by ChannelNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = ChannelNorm(outputs, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, inputs, h, w] -> [b, outputs, h, w]."""
        return self.norm(super().forward(x))


class MMRStudent(nn.Module):
    """Masked ViT encoder, restored token grid and simple feature pyramid.

    The images have `image_size` pixels, (height, width) or one number for both, cut in patches of
    `patch`; `width` is d, a multiple of 4 and of `heads`; `teacher_channels` are those of
    layer1..3, 0 for a layer that is not reconstructed. The encoder's position table always has the
    grid of a 224 px image, the decoder's that of `image_size`.
    """

    def __init__(
        self, image_size=224, patch=16, width=768, depth=12, heads=12, teacher_channels=WIDE_RESNET
    ):
        super().__init__()
        self.image_size = pair(image_size)
        self.grid = tuple(side // patch for side in self.image_size)
        if any(n % patch for n in self.image_size) or width % heads or width % 4:
            raise ValueError(
                f"{image_size=} must be a multiple of {patch=}, {width=} of {heads=}, 4"
            )
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch)))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_FPN_mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("pos_embed", sincos_table(width, 224 // patch))
        self.register_buffer("decoder_FPN_pos_embed", sincos_table(width, self.grid))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

        c1, c2, c3 = teacher_channels
        half, quarter = width // 2, width // 4
        if c1:
            up1, up2 = (nn.ConvTranspose2d(n, n // 2, 2, 2) for n in (width, half))
            last = (NormedConv(quarter, c1, 1), NormedConv(c1, c1, 3))
            self.simfp_2 = nn.Sequential(up1, ChannelNorm(half, eps=1e-6), nn.GELU(), up2, *last)
        if c2:
            last = (NormedConv(half, c2, 1), NormedConv(c2, c2, 3))
            self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(width, half, 2, 2), *last)
        if c3:
            self.simfp_4 = nn.Sequential(NormedConv(width, c3, 1), NormedConv(c3, c3, 3))

        for module in self.modules():  # the pyramid and the bias of the patches keep torch's init
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))  # a view: in place

    def forward(self, images, mask_ratio=0.4, noise=None) -> dict[str, torch.Tensor]:
        """Predicts the teacher's maps from the visible patches of [b, 3, h, w] normalised images.

        A share `mask_ratio` of the patches never enters the encoder (0 at test time); the ascending
        order of `noise` [b, n], uniform when absent, chooses the visible ones.

        Returns:
            layer1 [b, c1, 4g, 4g], layer2 [b, c2, 2g, 2g], layer3 [b, c3, g, g]; latent
            [b, 1 + k, d], cls first, patches in the order of the noise; mask [b, n], 1 = dropped.
        """
        first, tokens = self.embed(images)
        b, n, d = tokens.shape
        keep = kept_tokens(n, mask_ratio)
        noise = torch.rand(b, n, device=images.device) if noise is None else noise
        shuffle = noise.argsort(dim=1, stable=True)
        restore = shuffle.argsort(dim=1)

        visible = tokens.gather(1, shuffle[:, :keep, None].expand(-1, -1, d))  # [b, k, d]
        latent = self.encode(first, visible)  # [b, 1 + k, d]

        dropped = self.decoder_FPN_mask_token.to(latent.dtype).expand(b, n - keep, -1)
        tokens = torch.cat([latent[:, 1:], dropped], dim=1)
        tokens = tokens.gather(1, restore[..., None].expand(-1, -1, d))
        return {**self.pyramid(tokens), "latent": latent, "mask": (restore >= keep).float()}

    def unmasked(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """The maps of `forward` at mask_ratio 0, without the shuffle, which only rounds anew."""
        return self.pyramid(self.encode(*self.embed(images))[:, 1:])

    def embed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[b, 3, h, w] -> (class token [1, 1, d], patches [b, n, d]), with their positions."""
        table = resize_table(self.pos_embed, self.grid)
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + table[:, 1:]
        return self.cls_token + table[:, :1], tokens

    def encode(self, first: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Class token [1, 1, d] and visible tokens [b, k, d] -> latent [b, 1 + k, d]."""
        first = first.expand(tokens.shape[0], -1, -1)
        return self.norm(self.blocks(torch.cat([first, tokens], dim=1)))

    def pyramid(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tokens of all patches [b, n, d] -> the maps of the layers that are reconstructed."""
        tokens = tokens + self.decoder_FPN_pos_embed[:, 1:]
        x = tokens.transpose(1, 2).unflatten(2, self.grid)  # [b, d, g, g]
        stages = zip(LAYERS, ("simfp_2", "simfp_3", "simfp_4"), strict=True)
        return {name: getattr(self, stage)(x) for name, stage in stages if hasattr(self, stage)}


def cosine_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine over the channels, [b, c, h, w] twice -> [b, h, w] in [0, 2], at least float32."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    z, f = student.to(dtype), teacher.to(dtype)
    squared_norms = (z * z).sum(1) * (f * f).sum(1)
    return 1 - (z * f).sum(1) / squared_norms.clamp(min=1e-16).sqrt()


def mmr_loss(student_maps: dict, teacher_maps: dict) -> torch.Tensor:
    """Sum over the scales of the mean cosine distance over all locations; scalar in [0, 6]."""
    names = [name for name in LAYERS if name in student_maps]
    return sum(cosine_distance(student_maps[name], teacher_maps[name]).mean() for name in names)


def anomaly_maps(student_maps: dict, teacher_maps: dict, size, sigma=4.0) -> np.ndarray:
    """Sum of the aligned-corners bilinear distance maps, Gaussian-smoothed (`sigma` px, 0 = raw).

    Returns float64 [b, h, w], the `size` of the images.
    """
    total = 0.0
    for name in (name for name in LAYERS if name in student_maps):
        maps = cosine_distance(student_maps[name], teacher_maps[name])[:, None].double()
        maps = F.interpolate(maps, size=pair(size), mode="bilinear", align_corners=True)
        total = total + maps[:, 0]
    maps = total.cpu().numpy()
    return ndimage.gaussian_filter(maps, sigma, axes=(1, 2)) if sigma else maps


def image_scores(maps: np.ndarray) -> np.ndarray:
    """Anomaly scores [b]: the maximum of each map [b, h, w]."""
    return maps.max(axis=(1, 2))


def adamw_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict]:
    """Parameter groups of AdamW: vectors and biases are not decayed, the cls and mask tokens are.

    The position tables are buffers: no optimiser ever sees them.
    """
    groups = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": weight_decay}]
    for name, parameter in model.named_parameters():
        is_decayed = parameter.ndim > 1 and not name.endswith(".bias")
        groups[is_decayed]["params"].append(parameter)
    return groups


def learning_rate(epoch: int, epochs: int = 200, base: float = 1e-3) -> float:
    """Rate of a 0-based epoch: linear warm-up (exactly 0 at first), base, base/10, base/100.

    200 epochs warm up for 50 and drop at 119 and 159; other lengths scale these, rounded down.
    """
    warmup, first_drop, second_drop = (e * epochs // 200 for e in (50, 119, 159))
    if epoch < warmup:
        return base * epoch / warmup
    return base * 0.1 ** ((epoch >= first_drop) + (epoch >= second_drop))


def make_optimizer(student: MMRStudent, lr: float = 0.0) -> torch.optim.AdamW:
    """Official AdamW; set the rate of every epoch in its param_groups (see `learning_rate`)."""
    return torch.optim.AdamW(adamw_groups(student), lr, betas=(0.9, 0.95))


def train_step(student, teacher, optimizer, images, mask_ratio=0.4, noise=None) -> torch.Tensor:
    """One update of the student on images [b, 3, h, w]; returns the loss, a detached scalar."""
    with torch.no_grad():
        targets = teacher(images)
    loss = mmr_loss(student(images, mask_ratio, noise), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def load_file(path: str) -> tuple[dict, dict]:
    """(tensors by name, text beside them) of a .safetensors file or a .pth file."""
    if not str(path).endswith(".safetensors"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        return state, getattr(state, "_metadata", {}).get("mmrjax", {})
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def load_student(path: str, heads: int | None = None) -> MMRStudent:
    """Student from a file with the official key names, in evaluation mode; see `student_of`.

    `view` of it holds the arguments of `load_image`.
    """
    state, header = load_file(path)
    if "decoder_FPN_mask_token" not in state:
        raise ValueError(f"{path} holds no MMR student, but {', '.join(list(state)[:3])}, …")
    return student_of(state, header, heads)


def student_of(state: dict, header: dict, heads: int | None = None) -> MMRStudent:
    """Student from tensors with the official key names, in evaluation mode.

    The shapes give its sizes, the text beside them what they do not: heads (else width / 64), and
    sides of an image that is no square.
    """
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["decoder_FPN_pos_embed"].shape[1] - 1) * patch
    sizes = {
        k: tuple(map(int, header[k].split(","))) for k in ("image_size", "resize") if k in header
    }
    channels = [state.get(f"simfp_{i}.norm.weight", ()) for i in ("2.5", "3.2", "4.1")]
    student = MMRStudent(
        image_size=sizes.get("image_size", side),
        patch=patch,
        width=width,
        depth=sum(name.endswith(".norm1.weight") for name in state),
        heads=heads or int(header.get("heads", 0)) or max(1, width // 64),
        teacher_channels=[len(weight) for weight in channels],
    )
    student.pos_embed = torch.empty_like(state["pos_embed"])  # a learned one may be of another size
    student.load_state_dict(state, strict=True)
    student.view = {"image_size": student.image_size, **sizes}
    student.view |= {k: header[k] for k in ("interpolation",) if k in header}
    return student.eval()


def load_teacher(path: str, arch: str, **sizes) -> ResNetTeacher:
    """Teacher through layer3 from torchvision's names; layer4 and fc may be there or not."""
    return teacher_of(load_file(path)[0], arch, **sizes)


def teacher_of(state: dict, arch: str, **sizes) -> ResNetTeacher:
    """Teacher through layer3 from tensors with torchvision's names."""
    teacher = ResNetTeacher(arch, **sizes)
    used = {k: v for k, v in state.items() if not k.startswith(("layer4.", "fc."))}
    teacher.load_state_dict(used, strict=True)
    return teacher


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """Values 0..255 [b, h, w, 3] -> ImageNet-normalised float32 [b, 3, h, w]."""
    scaled = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
    return torch.from_numpy(scaled.astype(np.float32)).permute(0, 3, 1, 2).contiguous()


def load_image(path: str, image_size, resize=None, interpolation="bilinear") -> torch.Tensor:
    """Test image [1, 3, h, w]: squashed to `resize`, then the centre of `image_size`.

    Sizes are (height, width) or one number; the official `resize` is 8/7 of the size, 256 for 224.
    """
    size = pair(image_size)
    resize = pair(resize or tuple(n * 8 // 7 for n in size))
    how = Image.Resampling[interpolation.upper()]
    with open(path, "rb") as file:  # from a path, Pillow 12 turns an RGBA TIFF wrongly
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.read()), formats=FORMATS))
    pixels = np.asarray(upright.convert("RGB").resize(resize[::-1], how))
    top, left = (round((n - s) / 2) for n, s in zip(resize, size, strict=True))
    return normalise(pixels[None, top : top + size[0], left : left + size[1]])

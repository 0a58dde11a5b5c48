"""Whole scorers in PyTorch: networks, anomaly map and score of a method as one module.

A method builds its scorer in `torch_scorer`, from weights and plain numbers. mmrjax.export writes
the module as ONNX, mmrjax.bench runs it side by side with JAX. Needs the torch extra. Shapes: b
batch, h w image or map, d patch embedding, c channels; images are uint8 RGB [b, h, w, 3].
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from mmrjax.models import backbones, efficientnet, vit_backbone
from mmrjax.weights import torch_efficientnet, torch_twin, torch_vit

Matrices = tuple[np.ndarray, np.ndarray]  # of rows [m, h] and of columns [n, w]


class Resample(nn.Module):
    """A linear map of rows and one of columns, such as an interpolation."""

    def __init__(self, matrices: Matrices):
        super().__init__()
        for name, matrix in zip(("rows", "columns"), matrices, strict=True):
            self.register_buffer(name, torch.from_numpy(np.asarray(matrix, np.float32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [b, h, w] -> [b, m, n], or [b, h, w, d] -> [b, m, n, d]."""
        if x.ndim == 3:
            return self.rows @ x @ self.columns.T
        x = self.columns @ x  # [b, h, n, d]
        return (self.rows @ x.flatten(2)).unflatten(2, x.shape[2:])


class Scorer(nn.Module):
    """Frozen teacher, normalisation, map and score; a subclass gives features and parts.

    Args:
      teacher: see `Teacher`.
      places: statistics of maps by place, {part: {"mean", "std": float32 [h, w]}}; or None.
    """

    def __init__(self, teacher: nn.Module, places: Mapping | None = None):
        super().__init__()
        self.teacher = teacher
        for part, x in (places or {}).items():
            statistics = np.stack([np.asarray(x["mean"]), np.asarray(x["std"])])
            self.register_buffer(f"place_{part}", torch.tensor(statistics))
        self.by_place = bool(places)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [b, h, w, 3] -> (map float32 [b, h, w], score float32 [b])."""
        parts, scored = self.parts(self.features(self.normalise(images)))
        if self.by_place:
            places = {part: getattr(self, f"place_{part}") for part in parts}
            parts = {part: (x - places[part][0]) / places[part][1] for part, x in parts.items()}
        total = sum(parts.values())
        if self.by_place or scored is None:
            scored = total
        return total, self.score(scored)

    def score(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps [b, h, w] -> scores [b]: the maximum."""
        return maps.amax((1, 2))

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [b, h, w, 3] -> float32 [b, 3, h, w] of the teacher's mean and deviation."""
        own = self.teacher
        return ((images.float() / 255 - own.mean) / own.std).permute(0, 3, 1, 2)

    def features(self, images: torch.Tensor):
        """Runs the networks on float32 [b, 3, h, w]; the result goes to `parts`."""
        raise NotImplementedError

    def parts(self, features) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """(parts of the map {name: float32 [b, h, w]}, the map that is scored if it is not)."""
        raise NotImplementedError


class MMRScorer(Scorer):
    """The cosine maps of a masked student, summed over the layers.

    Args:
      teacher: see `Teacher`.
      student: a `torch_twin.MMRStudent`.
      upsample: {layer name: matrices from the layer's grid to the image}.
      mask_ratio: share of patches that `loss` hides.
      places: see `Scorer`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        upsample: Mapping[str, Matrices],
        mask_ratio: float,
        places: Mapping | None = None,
    ):
        super().__init__(teacher, places)
        self.student, self.mask_ratio = student, mask_ratio
        self.upsample = nn.ModuleDict({name: Resample(pair) for name, pair in upsample.items()})

    def features(self, images):
        """(student's maps without a mask, teacher's maps), {layer: [b, c, h, w]}."""
        return self.student.unmasked(images), self.teacher(images)

    def parts(self, features):
        """One smoothed map of cosine distances for each layer."""
        student, teacher = features
        distance = torch_twin.cosine_distance
        return {k: up(distance(student[k], teacher[k])) for k, up in self.upsample.items()}, None

    def loss(self, images: torch.Tensor) -> torch.Tensor:
        """The training loss of float32 [b, 3, h, w] under random masks; scalar."""
        with torch.no_grad():
            targets = self.teacher(images)
        return torch_twin.mmr_loss(self.student(images, self.mask_ratio), targets)

    def optimiser(self, **options) -> torch.optim.Optimizer:
        """AdamW on the student, as the official code has it."""
        groups = torch_twin.adamw_groups(self.student)
        return torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.95), **options)


class PatchCoreScorer(Scorer):
    """Distances of patch embeddings to a memory bank, for one scale of the image or several.

    Args:
      teacher: see `Teacher`.
      scales: {part: an `Embedding` and a `Memory` in order, and its upsampling}.
      peak_of_patches: whether the score is the maximum of raw distances, not of the map.
      size: (height, width) of the images, px.
      places: see `Scorer`.
    """

    def __init__(
        self,
        teacher: nn.Module,
        scales: Mapping[str, tuple[nn.Module, nn.Module, Matrices]],
        peak_of_patches: bool,
        size: tuple[int, int],
        places: Mapping | None = None,
    ):
        super().__init__(teacher, places)
        self.embeddings = nn.ModuleDict({part: x[0] for part, x in scales.items()})
        self.memories = nn.ModuleDict({part: x[1] for part, x in scales.items()})
        self.upsample = nn.ModuleDict({part: Resample(x[2]) for part, x in scales.items()})
        self.peak_of_patches, self.size = peak_of_patches, size

    def features(self, images):
        """Patch embeddings {part: float32 [b, h, w, d]}."""
        return {
            part: embedding(self.teacher, images) for part, embedding in self.embeddings.items()
        }

    def parts(self, features):
        """One smoothed map of distances for each scale."""
        raw = {part: self.memories[part](x) for part, x in features.items()}
        parts = {part: self.upsample[part](x) for part, x in raw.items()}
        if not self.peak_of_patches:
            return parts, None
        return parts, sum(nearest(x, self.size) for x in raw.values())


class Embedding(nn.Module):
    """Patch embeddings of images at one scale.

    Args:
      maps: {layer: (channels, stride in px) of the teacher's map}, at least one.
      image_size: (height, width) of the images, px.
      seen_size: (height, width) of what the teacher sees, px.
      patch: side of a neighbourhood, in cells.
      width: length of an embedding; 0: the channels of all layers.
      standardised: False, or the share of the mean variance and the number that are added to the
        variance of a channel when maps are standardised per image.
      resize_matrix: (n_in, n_out) -> an interpolation [n_out, n_in].
      pool_matrix: (n_in, n_out) -> adaptive pooling [n_in, n_out].
    """

    def __init__(
        self,
        maps: Mapping[int, tuple[int, int]],
        image_size: tuple[int, int],
        seen_size: tuple[int, int],
        patch: int,
        width: int,
        standardised: tuple[float, float] | bool,
        resize_matrix: Callable[[int, int], np.ndarray],
        pool_matrix: Callable[[int, int], np.ndarray],
    ):
        super().__init__()
        self.layers, self.patch, self.width = sorted(maps), patch, width
        self.standardised = standardised
        grids = {n: tuple(-(-side // maps[n][1]) for side in seen_size) for n in self.layers}
        self.grid = grids[self.layers[0]]  # rows and columns of embeddings

        def resample(before: Sequence[int], after: Sequence[int]) -> nn.Module:
            if tuple(before) == tuple(after):
                return nn.Identity()
            return Resample(tuple(map(resize_matrix, before, after)))

        self.shrink = resample(image_size, seen_size)
        for layer in self.layers:
            channels = maps[layer][0]
            pool = pool_matrix(channels * patch**2, width or channels)
            self.register_buffer(f"pool{layer}", torch.from_numpy(pool.astype(np.float32)))
            self.add_module(f"align{layer}", resample(grids[layer], self.grid))

    def forward(self, teacher: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """[b, 3, h, w] -> float32 [b, h', w', width] on the grid of the shallowest layer."""
        images = self.shrink(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        maps, pooled = teacher(images), []
        for layer in self.layers:
            x = maps[f"layer{layer}"].float()
            if self.standardised:
                x = _standardise(x, *self.standardised)
            x = _neighbourhoods(x, self.patch)
            x = x @ getattr(self, f"pool{layer}")
            pooled.append(getattr(self, f"align{layer}")(x))
        if not self.width:
            return torch.cat(pooled, dim=-1).float()
        x = torch.stack(pooled, dim=-2)  # [b, h', w', layers, width]
        return x.flatten(3).unflatten(3, (self.width, len(pooled))).mean(dim=-1).float()


class Memory(nn.Module):
    """The memory bank of one scale.

    Args:
      memory: "bank" float32 [m, d] and, from these options, "whitening" [d, d], "expected" [m].
      chunk: rows of the bank that are compared at a time.
    """

    def __init__(self, memory: Mapping[str, np.ndarray], chunk: int):
        super().__init__()
        self.chunk = chunk
        bank = np.array(memory["bank"])
        for name in ("whitening", "expected"):
            value = torch.from_numpy(np.array(memory[name])) if name in memory else None
            self.register_buffer(name, value)
        self.register_buffer("bank", torch.from_numpy(bank))
        self.register_buffer("squares", torch.from_numpy(np.sum(bank**2, axis=1)))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Squared distances of [b, h, w, d] to the nearest rows, [b, h, w]; or over `expected`."""
        patches = patches if self.whitening is None else patches @ self.whitening
        best, expected = None, None
        for start in range(0, len(self.bank), self.chunk):
            rows = slice(start, start + self.chunk)
            part, row = (self.squares[rows] - 2 * patches @ self.bank[rows].T).min(-1)
            if self.expected is not None:
                own = self.expected[rows][row]
                expected = own if best is None else torch.where(part < best, own, expected)
            best = part if best is None else torch.minimum(best, part)
        distance = (best + patches.square().sum(-1)).clamp(min=0)
        return distance if expected is None else distance / expected


class Teacher(nn.Module):
    """A frozen network as `Scorer` takes it.

    Args:
      network: float32 [b, 3, h, w] -> {name of a tap: map}.
      names: {layer: name of its tap}.
      mean, std: of RGB in [0, 1].
    """

    def __init__(
        self,
        network: nn.Module,
        names: Mapping[int, str | int],
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.network, self.names = network, dict(names)
        self.register_buffer("mean", torch.tensor(np.float32(mean)))
        self.register_buffer("std", torch.tensor(np.float32(std)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Normalised float32 [b, 3, h, w] -> {"layer<n>": [b, c, h', w']}."""
        maps = self.network(images)
        return {f"layer{layer}": maps[name] for layer, name in self.names.items()}


def teacher(
    state: Mapping[str, np.ndarray],
    name: str,
    backbone: backbones.Backbone,
    sizes: Sequence[tuple[int, int]],
) -> Teacher:
    """The teacher of a method in PyTorch.

    Args:
      state: from `teachers.to_torch`.
      name: of the teacher.
      backbone: the teacher as the method sees it.
      sizes: (height, width) of all images that the teacher sees, px.

    Raises:
      ValueError: a teacher that has no PyTorch form.
    """
    arch, taps = backbone.arch, backbone.taps
    if isinstance(arch, vit_backbone.Architecture):
        names: dict = dict(taps)
        network = torch_vit.ViT(state, arch, tuple(taps.values()), sizes)
    elif isinstance(arch, efficientnet.Architecture):
        names = {layer: f"layer{layer}" for layer in taps}
        network = torch_efficientnet.EfficientNet(arch, dict(taps), state)
    elif name in torch_twin.ARCHITECTURES:
        names = {layer: f"layer{tap}" for layer, tap in taps.items()}
        network = torch_twin.teacher_of(tensors(state), name)
    else:
        raise ValueError(f"teacher {name} has no PyTorch form; use --output=….jax")
    return Teacher(network, names, arch.mean, arch.std)


def tensors(state: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A state dict of NumPy arrays as one of tensors."""
    return {name: torch.tensor(value) for name, value in state.items()}


def nearest(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Nearest-neighbour upsampling, [b, h, w] -> [b, *size]; every cell keeps a pixel."""
    rows, columns = (
        torch.arange(n_out, device=x.device) * n_in // n_out
        for n_in, n_out in zip(x.shape[1:], size, strict=True)
    )
    return x[:, rows][:, :, columns]


def _standardise(x: torch.Tensor, steady: float, tiny: float) -> torch.Tensor:
    """`patch_embedding.standardise` of [b, c, h, w]."""
    x = x - x.mean(dim=(2, 3), keepdim=True)
    variance = x.square().mean(dim=(2, 3), keepdim=True)
    return x / (variance + steady * variance.mean(dim=1, keepdim=True) + tiny).sqrt()


def _neighbourhoods(x: torch.Tensor, size: int) -> torch.Tensor:
    """Zero-padded s x s neighbourhoods, channel-major: [b, c, h, w] -> [b, h, w, c * s * s]."""
    h, w = x.shape[2:]
    x = nn.functional.pad(x.float(), (size // 2,) * 4)
    shifts = [x[:, :, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return torch.stack(shifts, dim=2).flatten(1, 2).permute(0, 2, 3, 1)

"""MALA in PyTorch: the masked autoencoder under MAE's names, TBM, the map and the score.

Needs the torch extra. Shapes: b batch, n patches, k visible ones, d width of the encoder, e width
of the decoder; images are NCHW in the networks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmrjax.models import mae
from mmrjax.weights import torch_scorers, torch_twin


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches, decoder of all; names and shapes are MAE's.

    Args:
      grid: patches per column and per row.
      sizes: width, depth and heads of the encoder.
      decoder_sizes: width, depth and heads of the decoder.
      patch: patch side in px.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        sizes: Sequence[int],
        decoder_sizes: Sequence[int],
        patch: int = 16,
    ):
        super().__init__()
        (d, depth, heads), (e, decoder_depth, decoder_heads) = sizes, decoder_sizes
        self.grid, self.patch, rows = tuple(grid), patch, 1 + grid[0] * grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, e))
        self.register_buffer("pos_embed", torch.zeros(1, rows, d))
        self.register_buffer("decoder_pos_embed", torch.zeros(1, rows, e))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d, patch, patch)})
        block = torch_twin.EncoderBlock
        self.blocks = nn.ModuleList(block(d, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.decoder_embed = nn.Linear(d, e)
        self.decoder_blocks = nn.ModuleList(block(e, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(e, eps=1e-6)
        self.decoder_pred = nn.Linear(e, patch * patch * 3)

    def encode(
        self, images: torch.Tensor, visible: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(after the first block, after all blocks and the norm), [b, 1 + k, d].

        Args:
          images: normalised [b, 3, h, w].
          visible: int [k], the patches that are seen; None: all.
        """
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x = x if visible is None else x[:, visible]
        first = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = first = self.blocks[0](torch.cat([first, x], dim=1))
        for block in self.blocks[1:]:
            x = block(x)
        return first, self.norm(x)

    def decode(self, latent: torch.Tensor, restore: torch.Tensor | None = None) -> torch.Tensor:
        """Decoded tokens of all patches, [b, 1 + k, d] -> [b, n, e].

        Args:
          latent: from `encode`.
          restore: int [n], where each patch stands among the visible and then the hidden ones.
        """
        x = self.decoder_embed(latent)
        if restore is not None:
            hidden = self.mask_token.expand(x.shape[0], len(restore) + 1 - x.shape[1], -1)
            x = torch.cat([x[:, :1], torch.cat([x[:, 1:], hidden], dim=1)[:, restore]], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def unpatchify(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, p * p * c] -> [b, h, w, c]."""
        (h, w), p = self.grid, self.patch
        x = x.reshape(-1, h, w, p, p, x.shape[-1] // p**2)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h * p, w * p, x.shape[-1])


class TokenBalance(nn.Module):
    """TBM, as `models.mala.TokenBalance`.

    Args:
      params: its parameters: "map" and, unless TBM is off, "balance" and perhaps "norm".
    """

    def __init__(self, params: Mapping[str, Mapping[str, np.ndarray]]):
        super().__init__()
        self.map = _linear(params["map"])
        self.balance = _linear(params["balance"]) if "balance" in params else None
        self.norm = None
        if "norm" in params:
            self.norm = nn.LayerNorm(len(params["norm"]["scale"]), eps=1e-6)
            self.norm.weight.data = torch.tensor(np.array(params["norm"]["scale"]))
            self.norm.bias.data = torch.tensor(np.array(params["norm"]["bias"]))

    def forward(
        self, first: torch.Tensor, last: torch.Tensor, decoded: torch.Tensor
    ) -> torch.Tensor:
        """[b, n, d], [b, n, d], [b, n, e] -> [b, n, p * p * 2]."""
        if self.balance is not None:
            u = self.balance(torch.cat([first, last], dim=-1))
            u = u if self.norm is None else self.norm(F.gelu(u))
            decoded = torch.cat([u, decoded], dim=-1)
        return self.map(decoded)


class MALAScorer(torch_scorers.Scorer):
    """The softmax of MALA's first channel, or the error of what is painted while it is hidden.

    Args:
      autoencoder: with its weights.
      balance: TBM; None: the pipeline "reconstruct".
      pixels: (mean, deviation) of the images, three numbers each.
      pool: side of the mean whose maximum is the score, px.
      groups: orders of the patches and numbers of visible ones, of "reconstruct".
      smooth: matrices that smooth the error.
      places: see `torch_scorers.Scorer`.
    """

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        balance: TokenBalance | None,
        pixels: tuple[Sequence[float], Sequence[float]],
        pool: int,
        groups: Sequence[tuple[np.ndarray, int]] = (),
        smooth: torch_scorers.Matrices | None = None,
        places: Mapping | None = None,
    ):
        super().__init__(nn.Identity(), places)
        self.autoencoder, self.balance, self.pool = autoencoder, balance, pool
        self.mean, self.std = (torch.tensor(x, dtype=torch.float32) for x in pixels)
        self.groups = [(np.asarray(order)[0], visible) for order, visible in groups]
        self.smooth = None if smooth is None else torch_scorers.Resample(smooth)

    def features(self, images):
        """The two channels before the softmax, or the error, [b, h, w, 2] or [b, h, w]."""
        own = self.autoencoder
        if self.balance is not None:
            first, last = own.encode(images)
            tokens = self.balance(first[:, 1:], last[:, 1:], own.decode(last))
            return own.unpatchify(tokens).float()
        total, shown = 0.0, images.permute(0, 2, 3, 1)
        for order, visible in self.groups:
            restore = torch.tensor(np.argsort(order), device=images.device)
            latent = own.encode(images, torch.tensor(order[:visible], device=images.device))[1]
            painted = own.unpatchify(own.decoder_pred(own.decode(latent, restore)))
            hidden = np.ones(len(order), np.float32)
            hidden[order[:visible]] = 0
            hidden = hidden.reshape(own.grid).repeat(own.patch, axis=0).repeat(own.patch, axis=1)
            error = ((shown - painted) * self.std).abs().mean(dim=-1)
            total = total + error * torch.tensor(hidden, device=images.device)
        return total / (len(self.groups) - 1)

    def parts(self, features):
        """{"anomaly"} or {"error"}."""
        if self.balance is None:
            return {"error": self.smooth(features)}, None
        return {"anomaly": features.softmax(dim=-1)[..., 0]}, None

    def score(self, maps):
        """The largest mean of pool x pool px; by place the maximum."""
        if self.by_place:
            return super().score(maps)
        return F.avg_pool2d(maps[:, None], self.pool, 1, self.pool // 2).amax((1, 2, 3))


def scorer(
    state: Mapping[str, np.ndarray],
    balance: Mapping | None,
    grid: tuple[int, int],
    heads: tuple[int, int],
    pixels: tuple[Sequence[float], Sequence[float]],
    pool: int,
    smooth: torch_scorers.Matrices,
    places: Mapping | None = None,
) -> MALAScorer:
    """A scorer from NumPy arrays.

    Args:
      state: the autoencoder with MAE's names and tables of the grid.
      balance: parameters of TBM; None: the pipeline "reconstruct".
      grid: patches per column and per row.
      heads: of the encoder and of the decoder.
      pixels: as for `MALAScorer`.
      pool: as for `MALAScorer`.
      smooth: as for `MALAScorer`.
      places: as for `MALAScorer`.
    """
    own = autoencoder_of(state, grid, heads)
    groups = mae.visible_groups(grid[0] * grid[1], mae.GROUPS)
    tbm = None if balance is None else TokenBalance(balance)
    return MALAScorer(own, tbm, pixels, pool, groups, smooth, places)


def autoencoder_of(
    state: Mapping[str, np.ndarray], grid: tuple[int, int], heads: tuple[int, int]
) -> MaskedAutoencoder:
    """An autoencoder from a state dict with MAE's names and tables of the grid.

    Args:
      state: NumPy arrays.
      grid: patches per column and per row.
      heads: of the encoder and of the decoder.
    """

    def depth(stack: str) -> int:
        return len({key.split(".")[1] for key in state if key.startswith(f"{stack}.")})

    sizes = state["cls_token"].shape[-1], depth("blocks"), heads[0]
    decoder = state["mask_token"].shape[-1], depth("decoder_blocks"), heads[1]
    model = MaskedAutoencoder(grid, sizes, decoder, state["patch_embed.proj.weight"].shape[-1])
    model.load_state_dict(torch_scorers.tensors(state), strict=True)
    return model


def _linear(params: Mapping[str, np.ndarray]) -> nn.Linear:
    kernel, bias = (torch.tensor(np.array(params[name])) for name in ("kernel", "bias"))
    layer = nn.Linear(*kernel.shape)
    layer.weight.data, layer.bias.data = kernel.T.contiguous(), bias
    return layer

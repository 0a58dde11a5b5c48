"""Masked autoencoders with their decoders under MAE's names: state dicts <-> mmrjax variables.

The names are those of facebookresearch/mae, whose files mae_visualize_vit_*.pth hold them under
"model". Ours are those of `models.mae.MaskedAutoencoder`, {"params", "positions"}. Position tables
are treated as MMR's are, see tables.py: the encoder's is resized to the image size of a model, the
decoder's is drawn for each image size.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from mmrjax.models import mae, positions
from mmrjax.weights import layouts, tables, torch_names
from mmrjax.weights.layouts import Name, State

DECODER_TABLE = "decoder_pos_embed"
DECODER = "decoder_embed.weight"  # only a file with a decoder has it


def names() -> Iterator[Name]:
    """Yields the names of encoder, mask token, decoder and both position tables."""
    yield from torch_names.encoder_names()
    yield "mask_token", "params/mask_token", "same"
    yield DECODER_TABLE, "positions/decoder_table", "table"
    for key, path in (("decoder_embed", "embed"), ("decoder_pred", "pixels")):
        yield f"{key}.weight", f"params/decoder/{path}/kernel", "linear"
        yield f"{key}.bias", f"params/decoder/{path}/bias", "same"
    yield from torch_names.transformer_names(
        "decoder_blocks", "decoder_norm", "params/decoder/stack"
    )


def has_decoder(state: State) -> bool:
    """Whether a state dict is that of a whole masked autoencoder."""
    return DECODER in state


def from_torch(state: State) -> dict:
    """MAE's state dict, decoder and all -> {"params", "positions"}.

    Raises:
      ValueError: naming the keys that `state` lacks.
    """
    return layouts.from_torch(state, names(), "a masked autoencoder")


def to_torch(variables: dict, grid: tables.Grid | None = None) -> State:
    """Variables of a masked autoencoder -> state dict with MAE's keys.

    Args:
      variables: {"params", "positions"}, see the top.
      grid: patches per column and per row of its images; None if both are equal. Tables that were
        resized or drawn for another grid than 14 x 14 become those of 14 x 14 again.
    """
    flat = layouts.flatten(variables)
    before = np.asarray(flat["positions/encoder_table"])
    encoder = tables.official_table(before, grid)
    decoder = np.asarray(flat["positions/decoder_table"])
    if len(encoder) != len(before):
        decoder = positions.sincos_2d(decoder.shape[1], tables.ENCODER_GRID)
    own = {"positions/encoder_table": encoder, "positions/decoder_table": decoder}
    whole = layouts.unflatten({**flat, **own})
    return layouts.contiguous(layouts.to_torch(whole, names(), "a masked autoencoder"))


def views(variables: dict) -> State:
    """The state dict with the position tables of a model's own image size; arrays are views."""
    return layouts.to_torch(variables, names(), "a masked autoencoder")


def hollow(state: State, size: tuple[int, int, int]) -> dict:
    """Variables of a masked autoencoder as zeros that take no memory, with a file's decoder.

    Args:
      state: with MAE's names, from which width and depth of the decoder are read.
      size: width, depth and heads of the encoder.

    Raises:
      ValueError: the file has no decoder.
    """
    if not has_decoder(state):
        raise ValueError(f"there is no decoder: {DECODER} is missing")
    width = len(state[DECODER])
    depth = len({key.split(".")[1] for key in state if key.startswith("decoder_blocks.")})
    model = mae.MaskedAutoencoder(tables.ENCODER_GRID, *size, width, depth, 1)
    return layouts.hollow(model.init, jnp.zeros((1, 224, 224, 3)))


def check(state: State, like: dict, what: str) -> None:
    """Raises ValueError unless a state dict fits a model, naming tensors and both shapes.

    Position tables may have other numbers of rows, and tensors of a classifier are passed over.

    Args:
      state: of a whole masked autoencoder, or of an encoder alone.
      like: variables of the model.
      what: begins the message.
    """
    wanted = layouts.to_torch(like, names(), "a masked autoencoder")
    given, optional = dict(state), ()
    if not has_decoder(state):
        given, optional = torch_names.encoder_part(state), torch_names.OPTIONAL
        wanted = {key: x for key, x in wanted.items() if key in torch_names.encoder_part(wanted)}
    for key in given.keys() & wanted.keys() & {"pos_embed", DECODER_TABLE}:
        if given[key].ndim == 3:
            shape = (1, given[key].shape[1], wanted[key].shape[2])
            wanted[key] = np.broadcast_to(wanted[key][:, :1], shape)
    layouts.check_fit(given, wanted, what, optional)


def merge(variables: dict, state: State, grid: tables.Grid) -> tuple[dict, torch_names.Report]:
    """Puts a state dict into freshly drawn variables; an encoder alone leaves the decoder drawn.

    Args:
      variables: of `models.mae.MaskedAutoencoder`.
      state: with MAE's or timm's names.
      grid: patches per column and per row of the model's images.

    Returns:
      (new variables, {"used", "missing", "unused", "replaced"} as `torch_names.merge_student`).

    Raises:
      ValueError: naming tensors that are missing or do not fit, with both shapes.
    """
    check(state, variables, "not an autoencoder or encoder of this shape")
    given = state if has_decoder(state) else torch_names.encoder_part(state)
    drawn = layouts.to_torch(variables, names(), "a masked autoencoder")
    merged = layouts.from_torch({**drawn, **given}, names(), "a masked autoencoder")
    before, after = variables["positions"], dict(merged["positions"])
    if "pos_embed" in given:
        after["encoder_table"] = tables.fit_table(after["encoder_table"], grid)
    if after["decoder_table"].shape != before["decoder_table"].shape:
        after["decoder_table"] = np.asarray(before["decoder_table"])
    report = {
        **torch_names.usage(state, given),
        "missing": [key for key in torch_names.OPTIONAL if key not in given],
        "replaced": [name for name in after if after[name] is not merged["positions"][name]],
    }
    return {**merged, "positions": after}, report

"""Floating-point operations of MMR, counted on paper: 2 per multiply and add of a matrix product.

Only matrix products and convolutions count, at their full size (a padded border counts, too). The
benchmark divides by these numbers, and the tests hold the compiled program to them. They are per
image; batch, scan and device count change nothing.
"""

from collections.abc import Mapping

from mmrjax.methods import mmr
from mmrjax.models import masking, resnet

PATCH = 16


def teacher(arch: resnet.Architecture, size_hw: tuple[int, int], layers: int = 3) -> int:
    """Forward pass up to layer `layers` of one image."""
    h, w = (n // 2 for n in size_hw)
    total = _conv(h * w, 3, arch.stem, 7)
    h, w, inputs = h // 2, w // 2, arch.stem
    for layer in range(layers):
        width, outputs = arch.widths[layer], arch.channels[layer]
        for i in range(arch.blocks[layer]):
            stride = 2 if layer and not i else 1
            before, h, w = h * w, h // stride, w // stride
            if arch.bottleneck:
                inner = width * arch.inner_factor
                total += _conv(before, inputs, inner, 1) + _conv(h * w, inner, inner, 3)
                total += _conv(h * w, inner, outputs, 1)
            else:
                total += _conv(h * w, inputs, outputs, 3) + _conv(h * w, outputs, outputs, 3)
            if stride != 1 or inputs != outputs:
                total += _conv(h * w, inputs, outputs, 1)
            inputs = outputs
    return total


def student(
    width: int,
    depth: int,
    channels: Mapping[int, int],
    size_hw: tuple[int, int],
    mask_ratio: float = 0.0,
) -> tuple[int, int]:
    """Forward pass of one image: (all of it, the patch embedding alone)."""
    patches = (size_hw[0] // PATCH) * (size_hw[1] // PATCH)
    kept = masking.kept_tokens(patches, mask_ratio)
    tokens = kept + 1
    embedding = _conv(kept, 3, width, PATCH)
    block = 12 * _conv(tokens, width, width, 1) + 4 * tokens**2 * width
    return embedding + depth * block + _pyramid(width, channels, patches), embedding


def training_step(config) -> int:
    """One image of a training step: teacher, and the student forward and twice as much back.

    The gradient of the patch embedding's input is not needed, augmentation is not counted.
    """
    whole, embedding = student(*_student_sizes(config), config.student.mask_ratio)
    return _teacher(config) + 3 * whole - embedding


def inference(config) -> int:
    """One image through both networks and the operators of the maps."""
    h, w = config.data.image_size
    maps = 0
    for layer in config.student.layers:
        rows, columns = h >> (layer + 1), w >> (layer + 1)
        maps += 2 * h * rows * columns + 2 * h * columns * w
    return _teacher(config) + student(*_student_sizes(config))[0] + maps


def _conv(pixels: int, inputs: int, outputs: int, size: int) -> int:
    return 2 * pixels * inputs * outputs * size * size


def _pyramid(width: int, channels: Mapping[int, int], patches: int) -> int:
    """The transposed convolutions of stride 2, then 1x1 and 3x3, of every stage."""
    total = 0
    for layer, outputs in channels.items():
        pixels, inputs = patches, width
        for _ in range(3 - layer):
            total += _conv(pixels, inputs, inputs // 2, 2)
            pixels, inputs = 4 * pixels, inputs // 2
        total += _conv(pixels, inputs, outputs, 1) + _conv(pixels, outputs, outputs, 3)
    return total


def _teacher(config) -> int:
    arch = resnet.architecture(config.teacher.name)
    return teacher(arch, tuple(config.data.image_size), max(config.student.layers))


def _student_sizes(config) -> tuple:
    width, depth, _ = mmr.student_size(config.student)
    arch = resnet.architecture(config.teacher.name)
    channels = {layer: arch.channels[layer - 1] for layer in config.student.layers}
    return width, depth, channels, tuple(config.data.image_size)

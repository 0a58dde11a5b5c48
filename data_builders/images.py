"""Image files in, the bytes that a record keeps out: decoding, checks, masks.

A record holds an image as the bytes of a JPEG, PNG or BMP file that every reader decodes to the
same uint8 pixels. Such files are kept byte for byte; anything else (WebP, TIFF, 16-bit
depth, an alpha channel, a rotation noted in EXIF, which decoders treat differently) becomes a PNG,
upright. Called by `common.RecordBuilder` for each record; it knows nothing of data sets or TFDS.
"""

import io
import os
import pathlib

import cv2
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from data_builders import limits

SUFFIXES_OF_FORMAT = {  # as Pillow names the formats; MPO is a JPEG with a preview
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
# The only formats that are ever opened. Pillow opens MPO as JPEG.
FORMATS = tuple(name for name in SUFFIXES_OF_FORMAT if name != "MPO")
SUFFIXES = tuple(dict.fromkeys(s for known in SUFFIXES_OF_FORMAT.values() for s in known))

_JPEG = b"\xff\xd8\xff"
_TIFF = (b"II", b"MM")
_PNG = b"\x89PNG\r\n\x1a\n"
_KEPT_MAGIC = (_JPEG, _PNG, b"BM")  # JPEG, PNG, BMP
_PILLOW_MODES = {  # as Pillow reads a TIFF or WebP of 8 bits -> as it is taken
    **{"1": "L", "L": "L", "LA": "RGBA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"},
    **{"RGBX": "RGB", "CMYK": "RGB", "YCbCr": "RGB"},
}
_NEW_SUBFILE_TYPE, _REDUCED_OR_MASK = 254, 1 | 4  # a TIFF's tag, and its bits
HOT = 10_000  # one pixel in so many may be hot
_EXIF_MARKS = (b"Exif", b"eXIf", b"EXIF", b"exif", b"tiff:Orientation")  # JPEG, PNG, WebP, XMP
_EXIF_ORIENTATION = 0x0112
_TURNS = {  # EXIF orientation -> the pixels as they are shown; 1 is upright
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: np.fliplr(np.rot90(pixels, -1)),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.fliplr(np.rot90(pixels)),
    8: np.rot90,
}
# Pillow's own limit cannot be raised from outside; `_check_size` comes before every decoding.
Image.MAX_IMAGE_PIXELS = None


class Damaged(ValueError):
    """A file that is no readable picture."""


def encode_image(
    source: os.PathLike | bytes | np.ndarray, where: str, full_scale: int = 65535
) -> tuple[bytes, tuple[int, int]]:
    """Returns the bytes that a record keeps for an image, and its size.

    Args:
      source: an image file, its bytes, or RGB pixels uint8 [h, w, 3].
      where: the image's name in error messages.
      full_scale: the value of a 16-bit image that becomes 255 (4095 for 12-bit cameras).

    Returns:
      The encoded image and its (height, width) in pixels.

    Raises:
      ValueError: the image is damaged, empty or of an unusual type; the message names it.
      FileNotFoundError: there is no such file.
    """
    if isinstance(source, np.ndarray):
        _check_pixels(source, where)
        return encode_png(source), source.shape[:2]
    data = _bytes(source)
    pixels = decode_upright(data, where)
    is_plain = pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2] == 3)
    if data.startswith(_KEPT_MAGIC) and is_plain and orientation(data) == 1:
        return data, pixels.shape[:2]
    pixels = _to_uint8(pixels, full_scale, where)
    if pixels.ndim == 3:
        pixels = np.ascontiguousarray(pixels[..., :3][..., ::-1])  # BGR(A) -> RGB
    return encode_png(pixels), pixels.shape[:2]


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns a PNG of grey [h, w] or RGB [h, w, 3] uint8 pixels."""
    bgr = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    return cv2.imencode(".png", np.ascontiguousarray(bgr))[1].tobytes()


def encode_mask(mask: np.ndarray) -> bytes:
    """Returns a one-channel PNG, 255 where `mask` [h, w] is true (not zero) and 0 elsewhere."""
    return encode_png((mask != 0).astype(np.uint8) * 255)


def read_grey(path: os.PathLike) -> np.ndarray:
    """Returns an image file as grey levels [h, w] in their own integer type.

    A colour image counts with its brightest channel; alpha is ignored; a rotation noted in EXIF is
    carried out. Made for masks: the class numbers of 16-bit masks survive, which OpenCV's
    reading as grey would divide away.

    Raises:
      ValueError: the file is damaged or not an image of integers; the message names it.
    """
    pixels = decode_upright(pathlib.Path(path).read_bytes(), str(path))
    if not np.issubdtype(pixels.dtype, np.integer):
        raise ValueError(f"{path}: expected integer grey levels, found {pixels.dtype}")
    return pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=-1)


def read_rgb(path: os.PathLike) -> np.ndarray:
    """Returns an 8-bit image file as RGB pixels uint8 [h, w, 3], turned upright.

    Raises:
      ValueError: the file is damaged; the message names it.
    """
    return decode(pathlib.Path(path).read_bytes(), cv2.IMREAD_COLOR, str(path))[..., ::-1]


def orientation(source: os.PathLike | bytes | np.ndarray) -> int:
    """Returns an image's EXIF orientation; 1 (upright) if none is noted, or none that exists."""
    if isinstance(source, np.ndarray):
        return 1
    data = _bytes(source)
    if not data.startswith(_TIFF) and not any(mark in data for mark in _EXIF_MARKS):
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            noted = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # of Pillow's parsers, which raise whatever a damaged tag makes them raise
        return 1  # damaged tags do not matter: OpenCV passes over them too
    return noted if noted in _TURNS else 1


def mask_as_shown(
    mask: np.ndarray, path: os.PathLike, turn: int, size_hw: tuple[int, int], where: str
) -> np.ndarray:
    """Returns a mask turned as its image is shown.

    If EXIF turns a photograph, its mask was drawn on the upright picture, or, by a tool that
    ignores EXIF, on the pixels as they are stored. The sizes decide, or a flag of the mask's own.

    Args:
      mask: read from `path` and turned by its own flag, [h, w].
      path: the mask's file.
      turn: the image's EXIF orientation.
      size_hw: size of the upright image.
      where: the image's name in error messages.

    Raises:
      ValueError: both fit and would mark different pixels.
    """
    if turn == 1 or orientation(path) != 1:
        return mask
    turned = _TURNS[turn](mask)
    if turned.shape != tuple(size_hw):
        return mask
    if mask.shape == turned.shape and not np.array_equal(mask, turned):
        raise ValueError(
            f"{where}: its EXIF flag turns it (orientation {turn}), and nothing tells whether the "
            f"mask {path} was drawn on the turned picture or on the stored one; save the picture "
            "without the flag, as the mask fits it"
        )
    return turned


def above_127(grey: np.ndarray) -> np.ndarray:
    """The usual rule for 8-bit masks: defect where the grey level exceeds 127."""
    return grey > 127


def decode(data: bytes, flags: int, where: str) -> np.ndarray:
    """Returns the pixels of an encoded image, as OpenCV decodes them with `flags`.

    Raises:
      ValueError: damaged, or absurdly large; the message begins with `where`.
    """
    _check_size(data, where)
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as e:  # more than its own limit, or than there is memory
        raise Damaged(f"{where}: OpenCV refuses the image ({e.err or e})") from e
    # OpenCV before 5 fills the missing part of a cut-off JPEG with grey and says nothing.
    if pixels is None or data.startswith(_JPEG):
        reason = _damage(data)
        if pixels is None or reason:
            reason = reason or "OpenCV does not read this format"
            raise Damaged(f"{where}: the image is damaged ({reason}); replace or delete it")
    return pixels


def format_of(data: bytes) -> str:
    """The format of an encoded image, a key of SUFFIXES_OF_FORMAT; empty for any other."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.format if image.format in SUFFIXES_OF_FORMAT else ""
    except Exception:  # of Pillow's parsers
        return ""


def largest_value(path: os.PathLike) -> int:
    """Returns the largest pixel value of an image deeper than 8 bits, or 0 for any other."""
    return bright_values(path)[1]


def bright_values(path: os.PathLike) -> tuple[int, int]:
    """The brightest levels of an image deeper than 8 bits, whatever its file is called.

    Returns:
      (level that all pixels but the few brightest keep to, largest level). A hot pixel of the
      camera belongs to those few: one in HOT of the pixels, or four. (0, 0) of 8-bit images.

    Raises:
      ValueError: the file is damaged; the message names it.
    """
    data = pathlib.Path(path).read_bytes()
    if data.startswith(_PNG):
        if data[24:25] != b"\x10":  # bit depth of the IHDR chunk
            return 0, 0
    elif not data.startswith(_TIFF):
        return 0, 0
    pixels = decode_upright(data, str(path))
    if pixels.dtype != np.uint16:
        return 0, 0
    levels = (pixels if pixels.ndim == 2 else pixels[..., :3].max(axis=-1)).ravel()
    rank = max(0, levels.size - 1 - max(4, levels.size // HOT))
    return int(np.partition(levels, rank)[rank]), int(levels.max())


def _check_pixels(pixels: np.ndarray, where: str) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(
            f"{where}: expected RGB pixels uint8 [h, w, 3], found {pixels.dtype} {pixels.shape}"
        )


def _check_size(data: bytes, where: str) -> None:
    """Refuses by the header what would take more memory than any camera's picture."""
    if not data:
        raise Damaged(f"{where}: the file is empty; replace or delete it")
    width, height = _size_in_header(data)
    if not width:  # OpenCV reads formats that Pillow does not, and nothing would bound their size
        reason = _damage(data) or "no size in its header"
        raise Damaged(f"{where}: the image is damaged ({reason}); replace or delete it")
    megapixels, limit = width * height / 1e6, limits.max_megapixels()
    if megapixels > limit:
        raise Damaged(
            f"{where}: {width}x{height} are {megapixels:.0f} million pixels, from "
            f"{len(data)} bytes; the limit is {limit:g}. Delete it, or if it is meant to be so "
            f"large, set MMRJAX_MAX_MEGAPIXELS={megapixels + 1:.0f}"
        )


def _size_in_header(data: bytes) -> tuple[int, int]:
    """(width, height), or (0, 0) if no header can be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # of Pillow's parsers
        pass
    if data.startswith(_TIFF):  # a TIFF of a kind that Pillow does not read, as float RGB
        try:
            tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if 43 in data[2:4] else 8])
            stream = io.BytesIO(data)
            stream.seek(tags.next)
            tags.load(stream)
            return int(tags[TiffImagePlugin.IMAGEWIDTH]), int(tags[TiffImagePlugin.IMAGELENGTH])
        except Exception:  # of Pillow's parsers
            pass
    return 0, 0


def _damage(data: bytes) -> str:
    """Why Pillow cannot decode `data`, or an empty text."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except UnidentifiedImageError:
        return f"{len(data)} bytes that are no known image format"
    except Exception as e:  # of Pillow's parsers
        return f"{e}, {len(data)} bytes"
    return ""


def decode_upright(data: bytes, where: str) -> np.ndarray:
    """Returns the pixels of an encoded image, with the rotation that the file notes carried out.

    Alpha stays beside the colours, which it does not change.

    Args:
      data: the encoded image.
      where: the image's name in error messages.

    Returns:
      Grey [h, w] or BGR(A) [h, w, 3 or 4], in the integer type of the file.

    Raises:
      ValueError: damaged, absurdly large, or several pages; the message begins with `where`.
    """
    _check_size(data, where)
    pages = _pages(data)
    if pages > 1:
        raise Damaged(
            f"{where}: the file holds {pages} pages or frames, and nothing tells which is meant; "
            "save the one that is meant as a file of its own"
        )
    pixels = _by_pillow(data, where)
    if pixels is None:
        pixels = decode(data, cv2.IMREAD_UNCHANGED, where)
    turn = 1 if data.startswith(_TIFF) else orientation(data)  # OpenCV turns a TIFF by itself
    return pixels if turn == 1 else np.ascontiguousarray(_TURNS[turn](pixels))


def _pages(data: bytes) -> int:
    """The number of pictures that a TIFF, PNG or WebP holds; reduced copies do not count."""
    if data.startswith((_JPEG, b"BM")):  # a JPEG's further pictures are previews
        return 1
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            count = getattr(image, "n_frames", 1)
            if count == 1 or not data.startswith(_TIFF):
                return count
            count = 0
            for page in range(image.n_frames):
                image.seek(page)
                count += not image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & _REDUCED_OR_MASK
            return count
    except Exception:  # of Pillow's parsers; decoding says what is wrong
        return 1


def _by_pillow(data: bytes, where: str) -> np.ndarray | None:
    """Grey or BGR(A) uint8 of a TIFF, upright, or a WebP; None of all that OpenCV reads as well.

    OpenCV multiplies the colours of a TIFF with its alpha.
    """
    if data.startswith(_KEPT_MAGIC):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            tags = getattr(image, "tag_v2", {})
            if max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (8,))) > 8:
                is_multiplied = tuple(tags.get(TiffImagePlugin.EXTRASAMPLES, ())) == (1,)
                return _unmultiplied(data, where) if is_multiplied else None
            wanted = _PILLOW_MODES.get(image.mode)
            image.load()  # by this, newer versions of Pillow turn a TIFF
            if tags:
                image = ImageOps.exif_transpose(image)
            pixels = None if wanted is None else np.asarray(image.convert(wanted))
    except UnidentifiedImageError:
        return None
    except Exception as e:  # of Pillow's parsers
        raise Damaged(f"{where}: the image is damaged ({e}); replace or delete it") from e
    if pixels is None or pixels.ndim == 2:
        return pixels
    return pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]


def _unmultiplied(data: bytes, where: str) -> np.ndarray:
    """BGRA of a 16-bit TIFF whose colours are stored multiplied with alpha."""
    pixels = decode(data, cv2.IMREAD_UNCHANGED, where)
    if pixels.ndim == 2 or pixels.shape[2] != 4:
        return pixels
    top = np.iinfo(pixels.dtype).max
    colours = pixels[..., :3].astype(np.float64) * top / np.maximum(pixels[..., 3:], 1)
    return np.dstack([np.minimum(np.rint(colours), top).astype(pixels.dtype), pixels[..., 3]])


def _bytes(source: os.PathLike | bytes) -> bytes:
    return source if isinstance(source, bytes) else pathlib.Path(source).read_bytes()


def _to_uint8(pixels: np.ndarray, full_scale: int, where: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype != np.uint16:
        raise Damaged(
            f"{where}: expected 8 or 16 bits a pixel, found {pixels.dtype}; save it as PNG"
        )
    return np.clip(np.rint(pixels * (255.0 / full_scale)), 0, 255).astype(np.uint8)

"""From an image file of any common format to uint8 pixels, by stated rules.

- Orientation: the EXIF tag is honoured.
- Alpha, and transparent colours: composited on white.
- Palette and CMYK: to RGB. 1 bit: 0 and 255. 16 bits: v becomes round(255 v / 65535). Floating-point pixels:
  refused.
- Several frames: the first.
- Size: both sides are resized to the target with Pillow's bilinear filter, which averages when it shrinks
  (antialias); the aspect ratio is not kept.
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"})
# Stubs that read no pixels, and PostScript, which would run another program on the user's file.
EXCLUDED_FORMATS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
ORIENTATION_TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(Exception):
    """The reason why a file gives no pixels, in a few words."""


class Header(NamedTuple):
    """What a file says about itself: its upright size and whether it is grey."""

    height: int
    width: int
    grey: bool


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - EXCLUDED_FORMATS))


@functools.cache
def extensions() -> frozenset[str]:
    """The file name endings of these formats, in small letters with the dot."""
    known = set(formats())
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in known)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "decompression bomb: more pixels than Pillow allows"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return (str(error) or type(error).__name__).splitlines()[0]


def read_header(path: str) -> Header:
    """Size and kind of a file, without decoding it.

    Raises:
        UnreadableError: If the file is empty, no image, or claims more pixels than Pillow thinks safe.
    """
    try:
        if os.path.getsize(path) == 0:
            raise UnreadableError("0 bytes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=formats()) as image:
                width, height = image.size
                if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
                    raise UnreadableError(f"decompression bomb: {width} x {height} pixels")
                if _orientation(image) >= 5:
                    width, height = height, width
                return Header(height, width, image.mode in GREY_MODES)
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise what they like on damaged files
        raise UnreadableError(_reason(error)) from error


def decode(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """The pixels of a file as uint8 (C, H, W), by the rules above.

    Args:
        path: The file.
        shape: (C, H, W) to return, C being 1 or 3.

    Raises:
        UnreadableError: If the file is missing, damaged or of a kind that is not read.
    """
    image = upright(path, grey=shape[0] == 1)
    if image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape[1], shape[2], shape[0]).transpose(2, 0, 1)


def upright(path: str, *, grey: bool) -> Image.Image:
    """The picture of a file in its own size, of mode L or RGB, by the rules above.

    Raises:
        UnreadableError: If the file is missing, damaged or of a kind that is not read.
    """
    try:
        with Image.open(path, formats=formats()) as opened:
            orientation = _orientation(opened)
            image = _eight_bits(opened)
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
        return image.convert("L" if grey else "RGB")
    except (UnreadableError, MemoryError):
        raise
    except Exception as error:
        raise UnreadableError(_reason(error)) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "F":
        raise UnreadableError("floating-point pixels")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableError("whole numbers outside 0..65535")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image

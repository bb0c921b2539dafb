"""From an encoded image to a picture of the channels asked for, or one line that says why there is none."""
import io
from typing import Any, BinaryIO

import fsspec
import numpy as np
from PIL import Image, UnidentifiedImageError

from harness.errors import UserError, one_line

MODES = {1: 'L', 3: 'RGB'}  # by channels


def decode(encoded: dict[str, Any] | None, where: str, channels: int = 3) -> Image.Image:
    """The picture of an encoded image, of 8 bits a channel.

    Grey, palette, CMYK and transparent pictures become RGB as by timm's loaders, which drop the transparency.

    Args:
        encoded: Its `bytes`, or the `path` of its file.
        where: Names it in errors.
        channels: 3, or 1 for grey.

    Raises:
        UserError: If it is missing, damaged, too large, or of values that have no known range.
    """
    if encoded is None or not (encoded['bytes'] or encoded['path']):
        raise UserError(f'{where} is missing; remove its row')
    try:
        with _open(encoded) as file, Image.open(file) as picture:
            return _to_8_bits(picture, where).convert(MODES[channels])
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f'{where} is larger than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, which could be an '
                        'attack; remove it, or make it smaller') from error
    except UnidentifiedImageError as error:
        raise UserError(f'{where} is damaged (no picture that Pillow knows); remove or mend it') from error
    except Exception as error:  # Pillow's readers raise many kinds on a damaged file
        raise UserError(f'{where} is damaged ({one_line(error, 120)}); remove or mend it') from error


def _open(encoded: dict[str, Any]) -> BinaryIO:
    """The file of an encoded image; that of a stream may have an address, such as hf://."""
    if encoded['bytes']:
        return io.BytesIO(encoded['bytes'])
    path = encoded['path']
    return fsspec.open(path).open() if '://' in path else open(path, 'rb')


def name_image(encoded: dict[str, Any] | None, row: int) -> str:
    """What an encoded image is called in errors: its file's name, or its row."""
    return (encoded and encoded['path']) or f'the image of row {row}'


def _to_8_bits(picture: Image.Image, where: str) -> Image.Image:
    """A picture of 16 bits or of floats scaled to 8 bits; Pillow's `convert` would cut it off at 255."""
    if not picture.mode.startswith(('I', 'F')):
        return picture
    pixels = np.asarray(picture, np.float64)
    low, high, white = pixels.min(), pixels.max(), 1 if picture.mode == 'F' else 2**16 - 1
    if not 0 <= low <= high <= white:  # NaN is refused too
        kind = 'floats' if picture.mode == 'F' else 'integers'
        raise UserError(f'{where} holds {kind} from {low:g} to {high:g}; they must lie in [0, {white}]')
    return Image.fromarray(np.round(pixels * (255 / white)).astype(np.uint8))

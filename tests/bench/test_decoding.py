"""From encoded images to pictures: every kind of file, at its own bit depth, or one line."""
import io
import zlib

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageDataset

from harness.data.decoding import decode
from harness.errors import UserError


def encoded(picture, kind='PNG', **kwargs):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **kwargs)
    return dict(bytes=buffer.getvalue(), path=None)


def noise(mode, size=(7, 5)):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(), mode if bands > 1 else 'L')


def palette(transparent):
    picture = noise('RGB').quantize(16)
    if transparent:
        picture.info['transparency'] = 3
    return picture


@pytest.mark.parametrize(('picture', 'kind'), [
    (noise('L'), 'PNG'), (noise('RGB'), 'JPEG'), (noise('RGBA'), 'PNG'), (noise('LA'), 'PNG'), (noise('CMYK'), 'JPEG'),
    (palette(False), 'PNG'), (palette(True), 'PNG'), (noise('L').convert('1'), 'PNG'), (noise('RGB'), 'WEBP'),
    (noise('RGB').quantize(16), 'GIF')])
@pytest.mark.parametrize('channels', [1, 3])
def test_8_bits_are_treated_as_by_timms_loader(tmp_path, picture, kind, channels):
    content = encoded(picture, kind)
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / 'a' / 'x.png').write_bytes(content['bytes'])  # timm goes by the name, Pillow by the content
    timms = ImageDataset(str(tmp_path), split='train', input_img_mode='RGB' if channels == 3 else 'L')[0][0]
    for found in (decode(content, 'it', channels),
                  decode(dict(bytes=None, path=str(tmp_path / 'train' / 'a' / 'x.png')), 'it', channels)):
        assert found.mode == timms.mode
        assert np.array_equal(np.asarray(found), np.asarray(timms))


def test_16_bits_and_floats_keep_their_range():
    """Pillow's own way to RGB cuts them off at 255."""
    ramp = np.linspace(0, 1, 256 * 4).reshape(16, 64)
    expected = np.round(255 * ramp)
    of_16_bits = Image.fromarray(np.round(65535 * ramp).astype(np.uint16))
    for content in (encoded(of_16_bits), encoded(of_16_bits, 'TIFF'),
                    encoded(Image.fromarray(np.round(65535 * ramp).astype(np.int32)), 'TIFF'),
                    encoded(Image.fromarray(ramp.astype(np.float32)), 'TIFF')):
        for channels in (1, 3):
            found = np.asarray(decode(content, 'it', channels), np.int64)
            assert (np.abs(found.reshape(16, 64, channels) - expected[..., None]) <= 1).all()
            assert len(np.unique(found)) == 256


def big():
    """A picture that says it has 20,000 x 20,000 pixels."""
    content = bytearray(encoded(Image.new('L', (9, 9)))['bytes'])
    content[16:24] = (20000).to_bytes(4, 'big') * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, 'big')
    return bytes(content)


GOOD = encoded(noise('RGB', (64, 64)))['bytes']
JPEG = encoded(noise('RGB', (64, 64)), 'JPEG')['bytes']
BAD = {
    'missing': (None, 'it is missing'),
    'empty': (dict(bytes=b'', path=None), 'it is missing'),
    'no bytes, no path': (dict(bytes=None, path=None), 'it is missing'),
    'no file': (dict(bytes=None, path='/nowhere/a.png'), 'it is damaged .*No such file'),
    'text': (b'a text', 'it is damaged .no picture'),
    'cut PNG': (GOOD[:len(GOOD) // 2], 'it is damaged'),
    'cut JPEG': (JPEG[:len(JPEG) // 2], 'it is damaged .*truncated'),
    'cut head': (GOOD[:20], 'it is damaged'),
    'wrong checksum': (GOOD[:60] + bytes([GOOD[60] ^ 255]) + GOOD[61:], 'it is damaged'),
    'bomb': (big(), 'it is larger than 178,956,970 pixels'),
    'floats': (encoded(Image.fromarray(np.full((2, 2), 1.5, np.float32)), 'TIFF'), 'floats from 1.5 to 1.5'),
    'not a number': (encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), 'TIFF'), 'floats from nan'),
    'integers': (encoded(Image.fromarray(np.full((2, 2), -1, np.int32)), 'TIFF'), 'integers from -1 to -1')}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_picture_is_one_line(name):
    content, words = BAD[name]
    if isinstance(content, bytes):
        content = dict(bytes=content, path=None)
    with pytest.raises(UserError, match=words) as error:
        decode(content, 'it')
    assert '\n' not in str(error.value)


def test_images_with_an_address_are_opened(tmp_path):
    """As those of a stream of pictures from the Hub are."""
    (tmp_path / 'a.png').write_bytes(GOOD)
    assert decode(dict(bytes=None, path=f'file://{tmp_path}/a.png'), 'it').size == (64, 64)

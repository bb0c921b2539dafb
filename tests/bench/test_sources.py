"""Data that can't be had or used: one line, status 2, and no run folder."""
import huggingface_hub
import pytest

from support.commands import refused
from support.data import write_parquet


@pytest.mark.parametrize('how', ['broken', 'refused'])
def test_unreachable_hub_is_one_line(hub, monkeypatch, tmp_path, how):
    if how == 'broken':
        hub.fail(503)
        monkeypatch.setattr('timm_sd.asking.WAITS', ())
    else:
        monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    said = refused('train.py', '-c', 'cifar10', '--output', tmp_path / 'output')
    assert 'uoft-cs/cifar10' in said
    assert 'the Hub is unreachable and it is not in the cache' in said
    asked = [request for request in hub.requests if 'cifar10' in request]
    assert len(asked) == (1 if how == 'broken' else 0)  # and not for half a minute, as the client would
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('how', ['corrupt parquet', 'corrupt image', 'two label columns'])
def test_bad_data_is_one_line(tmp_path, how):
    folder = write_parquet(tmp_path, labels=('fine', 'coarse') if how == 'two label columns' else ('label',))
    path = tmp_path / 'data' / 'train-00000-of-00001.parquet'
    content = path.read_bytes()
    path.write_bytes(dict([
        ('corrupt parquet', content[:200]), ('corrupt image', content.replace(b'IHDR', b'IHDX')),
        ('two label columns', content)])[how])
    said = refused('train.py', '--data-dir', folder, '--test-split', 'train', '--output', tmp_path / 'output')
    assert {'corrupt parquet': 'can not be read', 'corrupt image': 'row 0 is damaged (no picture that Pillow knows)',
            'two label columns': '--target-key'}[how] in said
    assert not (tmp_path / 'output').exists()

"""What is loaded has the checksum that the Hub names, finite numbers, and the shapes that its config.json says."""
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import timm_sd.hub
from timm_sd.download import download
from timm_sd.weight_files import WeightsError, check_weights

NAME = 'sd_resnet20_cifar.svhn'  # not in the package
REPO = f'our/{NAME}'


@cache
def state():
    torch.manual_seed(0)
    return timm.create_model('sd_resnet20_cifar').state_dict()


def content(**changed):
    return safetensors.torch.save({**state(), **{name.replace('__', '.'): x for name, x in changed.items()}})


def config(**changed):
    cfg = dict(architecture='sd_resnet20_cifar', num_classes=10, pretrained_cfg=dict(
        tag='svhn', input_size=[3, 32, 32], first_conv='conv1', classifier='fc', num_classes=10))
    return json.dumps(dict(cfg, **changed)).encode()


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """An empty cache of the Hub."""
    monkeypatch.setenv('TIMM_SD_HUB_ORG', 'our')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache'


def load(name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs)


def refused(name=NAME, **kwargs):
    """What is said, in one line, before a network is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_sd.hub, 'build_model_with_cfg', None)
        with pytest.raises((OSError, RuntimeError)) as caught:
            load(name, **kwargs)
    text = str(caught.value)
    assert type(caught.value) in (OSError, RuntimeError)
    assert len(text.splitlines()) == 1
    assert 'model.safetensors' in text
    return text


def blobs(place):
    return [path for path in place.rglob('*') if path.is_file() and 'blobs' in path.parts]


# --- checksums


def test_a_download_that_was_damaged_is_loaded_again(hub):
    hub.repo(REPO).commit({'model.safetensors': content()})
    hub.fail('corrupt', 'GET', times=1)
    assert all(torch.equal(x, state()[name]) for name, x in load().state_dict().items())


def test_a_hub_that_sends_other_content_is_not_believed(hub, place):
    hub.repo(REPO).commit({'model.safetensors': content()})
    hub.fail('corrupt', 'GET')
    assert 'has another checksum than the Hub names' in refused()
    assert blobs(place) == []  # timm alone would trust it from now on
    hub.heal()
    load()


def damage(place):
    (blob,) = blobs(place)
    data = bytearray(blob.read_bytes())
    data[-3] ^= 64
    blob.write_bytes(data)


def test_a_file_that_was_damaged_in_the_cache_is_replaced(hub, place):
    hub.repo(REPO).commit({'model.safetensors': content()})
    load()
    damage(place)
    assert all(torch.equal(x, state()[name]) for name, x in load().state_dict().items())


def test_a_damaged_file_of_the_cache_is_not_used_without_the_hub(hub, place):
    hub.repo(REPO).commit({'model.safetensors': content()})
    load()
    hub.fail(503)
    load()
    damage(place)
    assert 'has another checksum than the Hub names' in refused()
    hub.heal()
    load()


def test_where_the_cache_holds_no_links(hub, place, monkeypatch):
    """As on Windows: a file has its own name there, and the Hub's answer its checksum."""
    monkeypatch.setattr('huggingface_hub.file_download.are_symlinks_supported', lambda cache_dir=None: False)
    hub.repo(REPO).commit({'model.safetensors': content()})
    load()
    (file,) = place.rglob('model.safetensors')
    assert not file.is_symlink()
    file.write_bytes(content(fc__bias=torch.ones(10)))
    assert all(torch.equal(x, state()[name]) for name, x in load().state_dict().items())


def test_a_small_file_has_gits_checksum(hub, place):
    hub.repo(REPO).commit({'config.json': config()})
    assert Path(download('a', REPO, file='config.json')).read_bytes() == config()
    damage(place)
    assert Path(download('a', REPO, file='config.json')).read_bytes() == config()


# --- numbers and shapes


NAN, INF = torch.full((10,), float('nan')), torch.tensor([0.] * 9 + [float('-inf')])


@pytest.mark.parametrize(('changed', 'words'), [
    (dict(fc__bias=NAN), 'fc.bias holds numbers that are not finite'),
    (dict(fc__bias=INF), 'fc.bias holds numbers that are not finite'),
    (dict(fc__bias=NAN.half()), 'fc.bias holds numbers that are not finite'),
    (dict(layer1__0__bn1__running_var=torch.full((16,), float('nan'))), 'running_var holds numbers that are not'),
    (dict(fc__bias=torch.zeros(10, dtype=torch.int32)), 'fc.bias holds I32, no floating-point numbers'),
    (dict(fc__bias=torch.zeros(10, dtype=torch.uint8)), 'fc.bias holds U8, no floating-point numbers'),
    (dict(fc__weight=torch.zeros(7, 64)), 'fc.weight has 7 classes, and num_classes is 10'),
    (dict(conv1__weight=torch.zeros(16, 1, 3, 3)), 'conv1.weight takes 1 channels, and in_chans is 3'),
], ids=['nan', 'infinite', 'half', 'statistics', 'int32', 'uint8', 'classes', 'channels'])
def test_weights_that_are_refused(hub, tmp_path, changed, words):
    hub.repo(REPO).commit({'model.safetensors': content(**changed), 'config.json': config()})
    assert words in refused()
    assert words in refused(f'hf-hub:{REPO}')
    (tmp_path / 'model.safetensors').write_bytes(content(**changed))
    (tmp_path / 'config.json').write_bytes(config())
    assert words in refused(f'local-dir:{tmp_path}')
    assert words in refused(pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))


@pytest.mark.parametrize(('changed', 'words'), [
    (dict(num_classes=2 * 10 ** 7), 'fc.weight has 10 classes, and num_classes is 20000000'),
    (dict(model_args=dict(in_chans=10 ** 6)), 'conv1.weight takes 3 channels, and in_chans is 1000000'),
    (dict(num_classes='ten'), "num_classes is 'ten'"),
    (dict(num_classes=10.), 'num_classes is 10.0'),
    (dict(num_classes=None), 'num_classes is None'),
    (dict(model_args=dict(in_chans=0)), 'conv1.weight takes 3 channels, and in_chans is 0'),
    # timm would discard the classifier
    (dict(model_args=dict(num_classes=4)), 'num_classes of config.json is 10, and that of its model_args is 4'),
    (dict(num_classes=4, model_args=dict(num_classes=10)),
     'num_classes of config.json is 4, and that of its model_args is 10'),
    (dict(pretrained_cfg=dict(num_classes=4), num_classes=10, model_args=dict(num_classes=4)), 'its model_args is 4'),
    (dict(num_classes=9, pretrained_cfg=dict(classifier=None, first_conv='layer1')), 'fc.weight has 10 classes'),
    (dict(pretrained_cfg=dict(num_classes=10, label_offset=1)), 'fc.weight has 10 classes, and num_classes is 11'),
], ids=str)
def test_a_config_that_is_refused(hub, changed, words):
    hub.repo(REPO).commit({'model.safetensors': content(), 'config.json': config(**changed)})
    assert words in refused(f'hf-hub:{REPO}')


def test_a_config_names_no_other_source(hub, tmp_path):
    """timm would take the weights from there, or load them past our checks."""
    cfg = json.loads(config())['pretrained_cfg']
    for odd in (dict(state_dict=dict(a=1)), dict(url='http://127.0.0.1:9/a.pth'), dict(hf_hub_filename='a.bin'),
                dict(file='/nowhere.pth'), dict(custom_load=True)):
        files = {'model.safetensors': content(fc__bias=NAN), 'config.json': config(pretrained_cfg=dict(cfg, **odd))}
        hub.repo(REPO).commit(files)
        for name, blob in files.items():
            (tmp_path / name).write_bytes(blob)
        for name in (f'hf-hub:{REPO}', f'local-dir:{tmp_path}'):
            assert 'fc.bias holds numbers that are not finite' in refused(name)
        hub.repo(REPO).commit({'model.safetensors': content()})
        assert torch.equal(load(f'hf-hub:{REPO}').fc.weight, state()['fc.weight'])


def test_a_file_that_is_cut_off_is_no_whole_one(tmp_path):
    (tmp_path / 'model.safetensors').write_bytes(content()[:-4])
    (tmp_path / 'config.json').write_bytes(config())
    assert 'no whole safetensors file' in refused(f'local-dir:{tmp_path}')


def test_what_timm_adapts_is_loaded(hub):
    hub.repo(REPO).commit({'model.safetensors': content(), 'config.json': config()})
    for kwargs in (dict(num_classes=3), dict(num_classes=0), dict(in_chans=1), dict(features_only=True)):
        load(**kwargs)
        load(f'hf-hub:{REPO}', **kwargs)


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=3), dict(num_classes=0), dict(features_only=True)], ids=str)
def test_weights_that_lack_a_layer_are_refused(hub, tmp_path, kwargs):
    """timm loads in part what it loads without its classifier."""
    part = {name: x for name, x in state().items() if name != 'layer1.0.conv2.weight'}
    hub.repo(REPO).commit({'model.safetensors': safetensors.torch.save(part), 'config.json': config()})
    for name in (NAME, f'hf-hub:{REPO}'):
        with pytest.raises(RuntimeError, match='layer1.0.conv2.weight'):
            load(name, **kwargs)


def test_weights_of_fewer_bits_are_loaded(hub):
    halves = {name: x.half() if x.is_floating_point() else x for name, x in state().items()}
    hub.repo(REPO).commit({'model.safetensors': safetensors.torch.save(halves)})
    assert torch.equal(load().fc.weight, halves['fc.weight'].float())


def test_custom_load_is_for_other_networks(hub):
    cfg = dict(json.loads(config())['pretrained_cfg'], custom_load=True)
    hub.repo(REPO).commit({'model.safetensors': content(), 'config.json': config(pretrained_cfg=cfg)})
    assert torch.equal(load(f'hf-hub:{REPO}').fc.weight, state()['fc.weight'])


def test_eight_bits_and_tables_of_positions(tmp_path):
    path = str(tmp_path / 'a.safetensors')
    tensors = dict(a=torch.ones(3).to(torch.float8_e4m3fn), relative_position_index=torch.arange(4),
                   attention_bias_idxs=torch.arange(4))
    safetensors.torch.save_file(tensors, path)
    check_weights(path, {})
    safetensors.torch.save_file(dict(tensors, a=torch.full((3,), float('nan')).to(torch.float8_e4m3fn)), path)
    with pytest.raises(WeightsError, match='a holds numbers that are not finite'):
        check_weights(path, {})


# --- secrets


@pytest.mark.parametrize('token', ['hf_sécret', 'hf_se\x01cret', 'hf_se cret', 'hf_se\ncr\x7fet'])
def test_a_token_of_odd_characters_is_not_printed(hub, monkeypatch, token):
    monkeypatch.setattr('timm_sd.asking.get_token', lambda: token)
    said = refused()
    assert 'the token has characters that no token has' in said
    assert 'hf_s' not in said
    assert hub.requests == []


CODE = f"""
import sys, timm, timm_sd
try:
    timm.create_model({NAME!r}, pretrained=True)
except OSError as error:
    import traceback
    traceback.print_exc()
    sys.exit(3)
"""


@pytest.mark.parametrize('fault', [503, 403, 'truncate', 'lost'])
def test_a_password_in_the_address_is_not_printed(hub, monkeypatch, fault, tmp_path):
    hub.repo(REPO).commit({'model.safetensors': content()})
    hub.fail(fault, 'GET' if fault == 'truncate' else '')
    monkeypatch.setenv('HF_ENDPOINT', hub.url.replace('//', '//me:tiptop@'))
    monkeypatch.setenv('HF_HOME', str(tmp_path))
    code = f'import timm_sd.asking\ntimm_sd.asking.WAITS = (0,)\n{CODE}'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 3, result.stderr
    assert 'from the Hub' in result.stderr
    assert 'tiptop' not in result.stdout + result.stderr

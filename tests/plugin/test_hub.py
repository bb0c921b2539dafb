"""Weights from the Hub: where they are looked for, and what is said when they can't be had."""
import io
import os
import re
import time
import types
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

import timm_sd.download
from support.hub_server import Hub

NAME = 'sd_resnet20_cifar.svhn'  # not in the package


@cache
def good_weights(seed=0):
    torch.manual_seed(seed)
    return safetensors.torch.save(timm.create_model('sd_resnet20_cifar').state_dict())


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Creates a network with its weights from the organisation `our`, by an empty cache."""
    monkeypatch.setenv('TIMM_SD_HUB_ORG', 'our')

    def load(name=NAME, **kwargs):
        return timm.create_model(name, pretrained=True, cache_dir=str(tmp_path / 'cache'), **kwargs)
    return load


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds between two questions, which no test waits for."""
    waited = []
    clock = types.SimpleNamespace(**{**vars(time), 'sleep': waited.append})
    monkeypatch.setattr('timm_sd.asking.time', clock)
    monkeypatch.setattr('huggingface_hub.file_download.time', clock)
    return waited


@pytest.fixture
def timeouts(monkeypatch):
    """The time limit of each quick question to the Hub."""
    given, ask = [], timm_sd.download.get_hf_file_metadata

    def recorded(*args, timeout=None, **kwargs):
        given.append(timeout)
        return ask(*args, timeout=timeout, **kwargs)
    monkeypatch.setattr(timm_sd.download, 'get_hf_file_metadata', recorded)
    return given


def assert_holds(model, content):
    tensors, state = safetensors.torch.load(content), model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)


def error_of(load, kind=(OSError, RuntimeError), **kwargs):
    """What a load that fails says: one line that names the network and the file."""
    with pytest.raises(kind) as caught:
        load(**kwargs)
    assert type(caught.value) in (OSError, RuntimeError)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert NAME in text
    return text


def pickle_only():
    buffer = io.BytesIO()
    torch.save(safetensors.torch.load(good_weights()), buffer)
    return {'pytorch_model.bin': buffer.getvalue()}


# --- where they come from


def test_a_registered_name_loads_from_the_organisation(hub, load):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    assert_holds(load(), good_weights())


def test_what_the_package_holds_asks_no_hub(hub, load):
    hub.repo('our/sd_resnet20_cifar.c10').commit({'model.safetensors': good_weights()})
    load('sd_resnet20_cifar.c10')
    assert hub.requests == []


def test_a_newer_commit_is_loaded_and_a_pinned_one_stays(hub, load):
    repo = hub.repo(f'our/{NAME}')
    old = repo.commit({'model.safetensors': good_weights()})
    assert_holds(load(), good_weights())
    repo.commit({'model.safetensors': good_weights(1)})
    assert_holds(load(), good_weights(1))
    assert_holds(load(pretrained_cfg_overlay=dict(hf_hub_id=f'our/{NAME}@{old}')), good_weights())


@pytest.mark.parametrize('fault', [503, 'silent'])
def test_where_the_hub_does_not_answer_the_cache_does(hub, load, timeouts, monkeypatch, fault):
    monkeypatch.setattr(timm_sd.download, 'TIMEOUT_SECONDS', 0.2)
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    load()
    hub.fail(fault)
    hub.requests.clear()
    assert_holds(load(), good_weights())
    assert hub.requests  # it was asked first
    assert timeouts == [0.2, 0.2]


@pytest.mark.parametrize(('constant', 'value', 'words'), [
    # the port `discard`, where nobody listens
    ('HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}',
     'does not answer as it should (ConnectError); try later'),
    ('HF_HUB_OFFLINE', True, 'HF_HUB_OFFLINE is set, and the cache has no such file'),
])
def test_where_no_hub_is_reached_the_cache_does(hub, load, monkeypatch, constant, value, words):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    monkeypatch.setattr(huggingface_hub.constants, constant, value)
    assert words in error_of(load)
    monkeypatch.undo()
    monkeypatch.setenv('TIMM_SD_HUB_ORG', 'our')
    load()
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, constant, value)
    assert_holds(load(), good_weights())
    assert hub.requests == []


def test_the_given_cache_is_the_one_that_is_filled(hub, load, tmp_path):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    load()
    assert [path.read_bytes() for path in (tmp_path / 'cache').rglob('model.safetensors')] == [good_weights()]
    assert not [folder for folder, _, _ in os.walk(os.environ['HF_HOME']) if NAME in folder]


def test_without_a_given_cache_the_hubs_own_is_filled_and_read(hub, load, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'own'))
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', offline)
        assert_holds(timm.create_model(NAME, pretrained=True), good_weights())
    assert [path.read_bytes() for path in (tmp_path / 'own').rglob('model.safetensors')] == [good_weights()]


def test_a_private_repository_loads_with_a_token(hub, load, monkeypatch):
    hub.repo(f'our/{NAME}', private=True).commit({'model.safetensors': good_weights()})
    monkeypatch.setenv('HF_TOKEN', Hub.TOKEN)
    assert_holds(load(), good_weights())


def test_the_arguments_are_left_alone_and_load_twice(hub, load):
    hub.repo('our/elsewhere').commit({'model.safetensors': good_weights()})
    overlay = dict(hf_hub_id='our/elsewhere')
    for _ in range(2):
        assert_holds(load(pretrained_cfg_overlay=overlay), good_weights())
        assert overlay == dict(hf_hub_id='our/elsewhere')


# --- what can go wrong


@pytest.mark.parametrize(('files', 'private', 'words'), [
    (None, False, ['no such repository', 'HF_TOKEN']),
    ({'model.safetensors': b'seen by nobody'}, True, ['private', 'HF_TOKEN']),
    (pickle_only, False, ['no such file', 'safetensors']),
    (lambda: {'model.safetensors': good_weights()[:100]}, False, ['do not fit']),
    (lambda: {'model.safetensors': safetensors.torch.save({'fc.weight': torch.zeros(10, 3)})}, False,
     ['do not fit', 'Missing key']),
], ids=['no repository', 'private', 'a pickle', 'a broken header', 'other tensors'])
def test_wrong_files_on_the_hub_are_named(hub, load, files, private, words):
    if files is not None:
        hub.repo(f'our/{NAME}', private=private).commit(files() if callable(files) else files)
    said = error_of(load)
    assert all(word in said for word in ('model.safetensors', *words)), said


def test_what_is_wrong_on_this_machine_is_not_the_hubs_fault(hub, load, tmp_path):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    (tmp_path / 'cache').write_text('a file')
    said = error_of(load)
    assert str(tmp_path / 'cache') in said
    assert 'try later' not in said


def test_an_odd_name_is_none(hub, load):
    said = error_of(load, pretrained_cfg_overlay=dict(hf_hub_id='a b/c'))
    assert 'a b/c' in said
    assert 'try later' not in said


def test_missing_revision(hub, load):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    said = error_of(load, pretrained_cfg_overlay=dict(hf_hub_id=f'our/{NAME}@nowhere'))
    assert f'our/{NAME}@nowhere from the Hub: there is no such revision' in said


def test_without_organisation_it_says_what_was_tried(hub, load, monkeypatch):
    monkeypatch.delenv('TIMM_SD_HUB_ORG')
    assert f'{NAME}: the package has no such weights, and TIMM_SD_HUB_ORG is not set' in error_of(load)
    assert hub.requests == []


def test_a_silent_hub_is_given_up_and_asked_again_later(hub, load, timeouts, monkeypatch):
    allowed = timm_sd.download.TIMEOUT_SECONDS
    monkeypatch.setattr(timm_sd.download, 'TIMEOUT_SECONDS', 0.2)
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail('silent')
    said = error_of(load, kind=OSError)
    assert all(word in said for word in ('model.safetensors', 'does not answer', 'try later')), said
    assert len(hub.requests) <= 2  # the client asks a silent one twice
    assert timeouts == [0.2]
    assert 2 * allowed < 5  # seconds
    hub.heal()
    assert_holds(load(), good_weights())


def test_a_hub_that_fails_is_asked_again_for_a_while(hub, load, waits):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail(503)
    assert 'the Hub answers 503; try later' in error_of(load, kind=OSError)
    assert waits == [1, 2, 4, 8]
    assert len(hub.requests) == 5
    hub.heal()
    assert_holds(load(), good_weights())


@pytest.mark.parametrize('phase', ['HEAD', 'GET'])
@pytest.mark.parametrize(('status', 'headers', 'seconds'), [
    (500, {}, 1), (502, {}, 1), (429, {}, 1), (429, dict(Retry_After='7'), 7), (503, dict(Retry_After='300'), 300),
    (429, dict(RateLimit='"api";r=0;t=9'), 9)])
def test_what_passes_is_waited_for(hub, load, waits, monkeypatch, phase, status, headers, seconds):
    monkeypatch.setattr('huggingface_hub.utils._http.time', types.SimpleNamespace(sleep=waits.append))
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail(status, phase, times=1, **headers)
    assert_holds(load(), good_weights())
    assert [*map(int, waits)] in ([seconds], [seconds + 1])  # the client adds a second


def test_who_is_to_wait_for_long_is_told(hub, load, waits):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail(429, Retry_After='3600')
    assert 'the Hub answers 429; try later' in error_of(load)
    assert waits == []


@pytest.mark.parametrize(('status', 'words'), [
    (401, 'the Hub does not accept the token (401): log in with hf auth login'),
    (403, 'the Hub does not accept the token (403): log in with hf auth login'),
    (400, 'the Hub answers 400'),
])
@pytest.mark.parametrize('phase', ['HEAD', 'GET'])
def test_the_advice_fits_the_status(hub, load, waits, phase, status, words):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail(status, phase, X_Error_Message='Invalid credentials in Authorization header')
    assert words in error_of(load)
    assert waits == []


@pytest.mark.parametrize('where', ['GET', 'HEAD'])
def test_a_hub_that_falls_silent_is_given_up(hub, load, monkeypatch, where):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    monkeypatch.setattr(timm_sd.download, 'SILENCE_SECONDS', 0.3)
    if where == 'HEAD':  # after the quick question
        ask = timm_sd.download.get_hf_file_metadata

        def asked(*args, **kwargs):
            answer = ask(*args, **kwargs)
            hub.fail('silent')
            return answer
        monkeypatch.setattr(timm_sd.download, 'get_hf_file_metadata', asked)
    else:
        hub.fail('silent', where)
    assert 'does not answer as it should (TimeoutError)' in error_of(load, kind=OSError)


def test_a_slow_download_goes_on_and_shows_it(hub, load, monkeypatch, capfd):
    monkeypatch.setattr(timm_sd.download, 'SILENCE_SECONDS', 1.5)
    monkeypatch.setattr(timm_sd.download, 'CHUNK_BYTES', 2 ** 14)
    monkeypatch.setenv('TQDM_POSITION', '-1')  # the bar is shown without a terminal too
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail('slow', 'GET')  # four seconds
    assert_holds(load(), good_weights())
    shown = {int(percent) for percent in re.findall(r'model.safetensors: +(\d+)%', capfd.readouterr().err)}
    assert len(shown) >= 3


def test_who_waits_for_the_download_of_another_process_goes_on(hub, load, monkeypatch, tmp_path):
    """The client waits for the other one's lock, and its own progress bar rests."""
    monkeypatch.setattr(timm_sd.download, 'SILENCE_SECONDS', 1.5)
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail('slow', 'GET', times=1)  # four seconds
    with ThreadPoolExecutor() as pool:
        for model in [pool.submit(load), pool.submit(load)]:
            assert_holds(model.result(), good_weights())
    assert len([request for request in hub.requests if request.startswith('GET')]) == 1


def test_a_body_that_breaks_off_is_no_file(hub, load, tmp_path):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fail('truncate', 'safetensors')
    said = error_of(load)
    assert all(word in said for word in ('model.safetensors', 'does not answer')), said
    hub.heal()
    assert_holds(load(), good_weights())  # what came of it before is not taken for it

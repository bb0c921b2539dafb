"""Weights from the Hub: where they are looked for, and what is said when they can't be had."""
import io
import os
import time
import types
from functools import cache

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch

import timm_sd.hub
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


@pytest.fixture
def timeouts(monkeypatch):
    """The time limit of each quick question to the Hub."""
    given, ask = [], timm_sd.hub.get_hf_file_metadata

    def recorded(*args, timeout=None, **kwargs):
        given.append(timeout)
        return ask(*args, timeout=timeout, **kwargs)
    monkeypatch.setattr(timm_sd.hub, 'get_hf_file_metadata', recorded)
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


@pytest.mark.parametrize('fault', ['503', 'silent'])
def test_where_the_hub_does_not_answer_the_cache_does(hub, load, timeouts, monkeypatch, fault):
    monkeypatch.setattr(timm_sd.hub, 'TIMEOUT_SECONDS', 0.2)
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    load()
    hub.fault = fault
    hub.requests.clear()
    assert_holds(load(), good_weights())
    assert hub.requests  # it was asked first
    assert timeouts == [0.2, 0.2]


@pytest.mark.parametrize(('constant', 'value'), [
    # the port `discard`, where nobody listens
    ('HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}'),
    ('HF_HUB_OFFLINE', True),
])
def test_where_no_hub_is_reached_the_cache_does(hub, load, monkeypatch, constant, value):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    monkeypatch.setattr(huggingface_hub.constants, constant, value)
    assert 'does not answer' in error_of(load)
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
    (lambda: {'model.safetensors': safetensors.torch.save({'fc.weight': torch.zeros(3, 3)})}, False,
     ['do not fit', 'Missing key']),
], ids=['no repository', 'private', 'a pickle', 'a broken header', 'other tensors'])
def test_wrong_files_on_the_hub_are_named(hub, load, files, private, words):
    if files is not None:
        hub.repo(f'our/{NAME}', private=private).commit(files() if callable(files) else files)
    said = error_of(load)
    assert all(word in said for word in ('model.safetensors', *words)), said


def test_missing_revision(hub, load):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    said = error_of(load, pretrained_cfg_overlay=dict(hf_hub_id=f'our/{NAME}@nowhere'))
    assert f'our/{NAME}@nowhere on the Hub: there is no such revision' in said


def test_without_organisation_it_says_what_was_tried(hub, load, monkeypatch):
    monkeypatch.delenv('TIMM_SD_HUB_ORG')
    assert f'{NAME}: the package has no such weights, and TIMM_SD_HUB_ORG is not set' in error_of(load)
    assert hub.requests == []


@pytest.mark.parametrize(('fault', 'questions'), [('503', 1), ('silent', 2)])  # the client asks a silent one twice
def test_a_hub_that_does_not_answer_is_given_up_and_asked_again_later(hub, load, timeouts, monkeypatch, fault,
                                                                      questions):
    allowed = timm_sd.hub.TIMEOUT_SECONDS
    monkeypatch.setattr(timm_sd.hub, 'TIMEOUT_SECONDS', 0.2)
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fault = fault
    said = error_of(load, kind=OSError)
    assert all(word in said for word in ('model.safetensors', 'does not answer', 'pretrained=False')), said
    assert len(hub.requests) <= questions
    assert timeouts == [0.2]
    assert questions * allowed < 5  # seconds
    hub.fault = None
    assert_holds(load(), good_weights())


def test_a_body_that_breaks_off_is_no_file(hub, load, monkeypatch, tmp_path):
    # the client waits a second before each of its five tries
    clock = types.SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None})
    monkeypatch.setattr('huggingface_hub.file_download.time', clock)
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    hub.fault = 'truncate'
    said = error_of(load)
    assert all(word in said for word in ('model.safetensors', 'does not answer')), said
    hub.fault = None
    assert_holds(load(), good_weights())  # what came of it before is not taken for it

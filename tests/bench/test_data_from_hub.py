"""Data sets of the Hub, and the tools against it in processes of their own."""
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm

from harness.data.sources import SourceSettings, load_split
from harness.errors import UserError
from support.commands import SMALL, bench, refused, run_here
from support.data import write_parquet

NAME = 'sd_resnet20_cifar.svhn'  # not in the package


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """What is loaded in a test is kept for this test alone."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    return tmp_path / 'cache'


@pytest.fixture
def pictures(hub, tmp_path):
    """The data set some/pictures, on the branch `old` six pictures of brightness 10 i, on `main` two."""
    repo = hub.repo('some/pictures', 'datasets')
    for branch, n in (('old', 6), ('main', 2)):
        write_parquet(tmp_path / branch, n)
        repo.commit({path.name: path.read_bytes() for path in (tmp_path / branch).rglob('*.parquet')}, branch)
    return repo


def brightness(data):
    return [int(np.asarray(row['img'])[0, 0, 0]) for row in data]


def test_a_data_set_with_a_revision(pictures, cache):
    assert brightness(load_split(SourceSettings('some/pictures'), 'train')) == [0, 10]
    old = load_split(SourceSettings('some/pictures@old'), 'train')
    assert brightness(old) == [0, 10, 20, 30, 40, 50]
    assert old['label'] == [0, 1, 0, 1, 0, 1]
    assert list(cache.rglob('*.arrow'))


def test_a_stream_has_the_same_pictures_and_leaves_no_copy(pictures, cache):
    data = load_split(SourceSettings('some/pictures@old', streaming=True), 'train')
    assert brightness(data) == [0, 10, 20, 30, 40, 50]
    assert not list(cache.rglob('*.arrow'))


@pytest.mark.parametrize(('name', 'words'), [
    ('some/pictures@new', ['some/pictures', 'no revision', 'new']),
    ('some/nothing', ['some/nothing', 'private', 'hf auth login']),
    ('some/hidden', ['some/hidden', 'private', 'hf auth login']),
])
def test_a_data_set_that_is_not_there(hub, pictures, name, words):
    hub.repo('some/hidden', 'datasets', private=True).commit({'README.md': b'empty'})
    with pytest.raises(UserError) as caught:
        load_split(SourceSettings(name), 'train')
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) == 1


def test_train_says_so_before_it_makes_a_folder(hub, tmp_path):
    said = refused('train.py', *SMALL, '--output', tmp_path, '--dataset', 'some/nothing')
    assert "no data set 'some/nothing' on the Hub, or it is private" in said
    assert not list(tmp_path.iterdir())


def test_without_an_answer_the_cache_must_do(hub, pictures):
    hub.fault = '503'
    with pytest.raises(UserError, match="data set 'some/pictures': the Hub is unreachable and it is not in the cache"):
        load_split(SourceSettings('some/pictures'), 'train')
    assert len(hub.requests) == 1  # no second question: the client would ask for half a minute
    hub.fault = None
    load_split(SourceSettings('some/pictures'), 'train')
    hub.fault = '503'
    assert brightness(load_split(SourceSettings('some/pictures'), 'train')) == [0, 10]


# --- in processes of their own


@pytest.fixture
def env(tmp_path):
    return dict(os.environ, HF_HOME=str(tmp_path / 'hf'), TIMM_SD_HUB_ORG='our')


def put_digits(hub, folder, branch):
    folder.mkdir()
    for split in ('train', 'test'):
        load_split(SourceSettings('digits'), split).to_parquet(str(folder / f'{split}-00000-of-00001.parquet'))
    hub.repo('some/digits', 'datasets').commit({path.name: path.read_bytes() for path in folder.iterdir()}, branch)


@pytest.mark.slow
def test_trains_from_the_hub_as_from_its_stream_and_from_scikit_learn(hub, tmp_path):
    put_digits(hub, tmp_path / 'data', 'old')
    hub.repo('some/digits', 'datasets').commit({'README.md': b'empty'})
    train = [*SMALL, '--epochs', '1', '--output', tmp_path / 'output', '--experiment']
    runs = [bench('train.py', *train, 'hub', '--dataset', 'some/digits@old'),
            run_here('train.py', *train, 'stream', '--dataset', 'some/digits@old', '--streaming'),
            run_here('train.py', *train, 'here')]
    errors = []
    for run in runs:
        assert run.returncode == 0, run.stderr
        errors.append(json.loads(run.stdout.splitlines()[-1])['test_last'])
    assert errors[0] == errors[1] == errors[2]


@pytest.mark.slow
def test_a_silent_hub_has_no_data_set(hub, tmp_path):
    hub.fault = 'silent'
    result = bench('train.py', *SMALL, '--output', tmp_path, '--dataset', 'some/nothing', timeout=50)  # silent for 60 s
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert 'some/nothing' in result.stderr
    assert 'unreachable' in result.stderr


def load_weights(**env):
    """In a fresh process, with the weights' organisation `our`."""
    code = f'import timm_sd, timm; m = timm.create_model({NAME!r}, pretrained=True); print("loaded", type(m).__name__)'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=50, env=env)


@pytest.mark.slow
def test_weights_load_from_the_hub_then_from_the_cache(hub, tmp_path, env):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': safetensors.torch.save(
        timm.create_model('sd_resnet20_cifar').state_dict())})
    assert load_weights(**env).stdout == 'loaded ResNetCifar\n'
    asked = len(hub.requests)
    assert load_weights(**env, HF_HUB_OFFLINE='1').stdout == 'loaded ResNetCifar\n'
    assert len(hub.requests) == asked


@pytest.mark.slow
def test_a_silent_hub_is_one_line_at_the_end(hub, env):
    hub.fault = 'silent'
    result = load_weights(**env)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith('OSError: ')
    assert all(word in last for word in (NAME, 'model.safetensors', 'does not answer')), last

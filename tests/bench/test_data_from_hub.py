"""Data sets of the Hub, and the tools against it in processes of their own."""
import json
import subprocess
import time
import types

import datasets
import huggingface_hub
import numpy as np
import pytest
from accelerate import Accelerator

from harness.data.sources import SourceSettings, open_data
from harness.errors import UserError
from harness.hub_client import limit_time
from support.commands import SMALL, assert_same_run, bench, command, read_results, refused, run_here
from support.data import write_classes, write_parquet
from support.waiting import wait_until


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


def load_split(source, split):
    return open_data(source, Accelerator(cpu=True)).splits[split]


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


@pytest.fixture
def patience(monkeypatch):
    """How long the Hub may take for each question that comes first; the tests wait for a fraction of it."""
    asked = []
    monkeypatch.setattr('timm_sd.asking.WAITS', ())

    class Impatient(huggingface_hub.HfApi):
        def dataset_info(self, *args, timeout=None, **kwargs):
            asked.append(timeout)
            return super().dataset_info(*args, timeout=0.2, **kwargs)
    monkeypatch.setattr('harness.data.sources.huggingface_hub', types.SimpleNamespace(HfApi=Impatient))
    return asked


def test_what_passes_is_waited_for(hub, pictures, monkeypatch):
    waited = []
    monkeypatch.setattr('timm_sd.asking.time', types.SimpleNamespace(**{**vars(time), 'sleep': waited.append}))
    hub.fail(429, 'GET /api/datasets/some/pictures$', times=1, Retry_After='7')
    assert brightness(load_split(SourceSettings('some/pictures'), 'train')) == [0, 10]
    assert waited == [7]


@pytest.mark.parametrize('status', [401, 403])
def test_a_token_that_is_not_accepted_is_named(hub, pictures, status):
    hub.fail(status, X_Error_Message='Invalid credentials in Authorization header')
    with pytest.raises(UserError, match='does not accept the token .* log in with hf auth login'):
        load_split(SourceSettings('some/pictures'), 'train')


def test_a_stream_goes_on_after_a_stall(pictures, hub, monkeypatch):
    """As train.py asks: a question that only reads is asked a second time."""
    monkeypatch.setattr('harness.hub_client.ANSWER_SECONDS', 0.5)
    limit_time()
    data = load_split(SourceSettings('some/pictures@old', streaming=True), 'train')
    hub.fail('silent', 'GET .*resolve', times=1)
    assert brightness(data) == [0, 10, 20, 30, 40, 50]
    assert not hub.faults[0].times


def test_a_token_of_odd_characters_is_not_printed(hub, pictures, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_sécret')
    with pytest.raises(UserError, match='the token has characters that no token has') as caught:
        load_split(SourceSettings('some/pictures'), 'train')
    assert 'hf_s' not in str(caught.value)
    assert hub.requests == []


@pytest.mark.parametrize(('fault', 'questions'), [(503, 1), ('silent', 2)])  # the client asks a silent one twice
def test_a_silent_hub_falls_back_to_the_cache(hub, pictures, patience, fault, questions):
    hub.fail(fault)
    with pytest.raises(UserError, match="data set 'some/pictures': the Hub is unreachable and it is not in the cache"):
        load_split(SourceSettings('some/pictures'), 'train')
    assert patience == [3]  # seconds
    asked = [request for request in hub.requests if '/datasets/' in request]
    assert len(asked) <= questions  # no other question: the client would ask for half a minute
    assert datasets.config.HF_HUB_OFFLINE is False
    hub.heal()
    assert load_split(SourceSettings('some/pictures'), 'train')['label'] == [0, 1]
    hub.fail(fault)
    assert brightness(load_split(SourceSettings('some/pictures'), 'train')) == [0, 10]
    assert patience == [3] * 3


# --- in processes of their own


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
def test_a_stream_of_files_goes_on_after_kill_9(hub, tmp_path):
    """Three files and two workers; the Hub tells no length, and the second run reads what the first had left."""
    repo = hub.repo('some/stream', 'datasets')
    for number in range(3):
        write_classes(tmp_path / str(number), classes=2, train=8 + number, test=3)
        for split, count in (('train', 3), ('test', 1)):
            if number < count:
                file = tmp_path / str(number) / 'data' / f'{split}-00000-of-00001.parquet'
                repo.commit({f'{split}-{number:05d}-of-{count:05d}.parquet': file.read_bytes()})
    args = ['--dataset', 'some/stream', '--no-in-memory', '--streaming', '--epoch-size', '16', '--val-split', 'test',
            '--model', 'sd_resnet20_cifar', '--img-size', '8', '-b', '4', '-j', '2', '--threads', '1', '--no-amp',
            '--epochs', '12', '--output', tmp_path, '--resume', 'auto', '--experiment']
    whole = bench('train.py', *args, 'whole')
    assert whole.returncode == 0, whole.stderr
    assert '16/?/? train/val/test' in whole.stderr
    assert read_results(tmp_path / 'whole')['images'] == dict(train=16, val=6, test=6)
    with subprocess.Popen(command('train.py', *args, 'killed'), stderr=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as process:
        try:
            wait_until((tmp_path / 'killed' / 'checkpoints' / 'checkpoint-0003.pt').exists, process=process)
        finally:
            process.kill()
    assert not (tmp_path / 'killed' / 'results.json').exists()
    again = bench('train.py', *args, 'killed')
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path / 'killed', tmp_path / 'whole')


@pytest.mark.slow
def test_a_silent_hub_has_no_data_set(hub, tmp_path):
    hub.fail('silent')
    result = bench('train.py', *SMALL, '--output', tmp_path, '--dataset', 'some/nothing', timeout=240)  # silent for 600
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert 'some/nothing' in result.stderr
    assert 'unreachable' in result.stderr

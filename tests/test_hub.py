"""Publishing and loading against a Hub on loopback, by the real clients in processes of their own."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from hub_server import Hub

ROOT = Path(__file__).parent.parent
LOAD = "import timm_sd, timm; m = timm.create_model({!r}, pretrained=True); print('loaded', type(m).__name__)"


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
    """A finished run as train.py leaves it, that says it was trained on CIFAR-10; it was, in fact, on digits."""
    output = tmp_path_factory.mktemp('output')
    command = [sys.executable, str(ROOT / 'bench' / 'train.py'), '--model', 'sd_resnet20_cifar', '--img-size', '16',
               '--epochs', '1', '--threads', '1', '--no-amp', '--output', str(output), '--experiment', 'a']
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((output / 'a' / 'results.json').read_text())
    results['dataset'] = 'uoft-cs/cifar10'
    (output / 'a' / 'results.json').write_text(json.dumps(results))
    return output / 'a'


class Client:
    """Runs commands with the Hub at `hub`, an empty cache, and a token if asked for."""

    def __init__(self, hub, home):
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(('HF_', 'HUGGING'))}
        self.env.update(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_DISABLE_XET='1', TIMM_SD_HUB_ORG='our')

    def run(self, *command, token=False, **env):
        env = {**self.env, **(dict(HF_TOKEN=Hub.TOKEN) if token else {}), **env}
        return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=env,
                              timeout=120)

    def load(self, name, **kwargs):
        return self.run('-c', LOAD.format(name), **kwargs)

    def publish(self, folder, *args, token=True):
        return self.run(ROOT / 'bench' / 'publish.py', folder, *args, token=token)


@pytest.fixture
def client(hub, tmp_path):
    return Client(hub, tmp_path / 'hf')


def last_line(result):
    return result.stderr.strip().splitlines()[-1]


FILES = {'model.safetensors', 'config.json', 'README.md', 'results.json', 'summary.csv', 'curves.png', 'gates.png'}


def test_publish_and_load_back(hub, client, run_folder):
    result = client.publish(run_folder, '--repo', 'our/sd_resnet20_cifar.c100')
    assert result.returncode == 0, result.stderr
    repo = hub.repos['models', 'our/sd_resnet20_cifar.c100']
    oid = repo.branches['main']
    assert set(repo.commits[oid]) - {'.gitattributes'} == FILES
    assert f'hf_hub_id: our/sd_resnet20_cifar.c100@{oid}' in result.stdout
    assert Hub.TOKEN not in result.stdout + result.stderr
    assert 'model.safetensors: 100%' in result.stderr  # the progress bar
    config = json.loads(repo.commits[oid]['config.json'])
    assert config['architecture'] == 'sd_resnet20_cifar'
    assert config['label_names'] == [str(n) for n in range(10)]
    assert (config['pretrained_cfg']['tag'], config['pretrained_cfg']['license']) == ('c10', 'apache-2.0')

    again = client.publish(run_folder, '--repo', 'our/sd_resnet20_cifar.c100')  # changes nothing
    assert again.returncode == 0, again.stderr
    assert repo.branches['main'] == oid
    assert oid in again.stdout

    # the lines of the card, as they stand there, and the printed ones
    snippets = re.findall(r'```python\n(.*?)```', repo.commits[oid]['README.md'].decode(), re.DOTALL)
    assert len(snippets) == 4
    assert all('hf-hub:our/sd_resnet20_cifar.c100' in snippet for snippet in snippets)
    check = snippets[0] + 'import safetensors.torch, torch\nassert all(torch.equal(v, model.state_dict()[k]) ' \
        f'for k, v in safetensors.torch.load_file({str(run_folder / "model.safetensors")!r}).items())\n'
    for snippet in (check, *snippets[1:]):
        loaded = client.run('-c', snippet)
        assert loaded.returncode == 0, loaded.stderr
    pinned = client.load(f'hf-hub:our/sd_resnet20_cifar.c100@{oid}')
    assert pinned.returncode == 0, pinned.stderr
    local = client.load(f'local-dir:{write_dry_run(client, run_folder)}')
    assert local.returncode == 0, local.stderr


def test_timms_own_architecture_needs_no_plugin(hub, client, tmp_path):
    train = [ROOT / 'bench' / 'train.py', '--model', 'sd_resnet18', '--model-kwargs', 'global_pool=max', '--img-size',
             '32', '--epochs', '1', '--no-amp', '--output', tmp_path, '--experiment', 'a']
    assert client.run(*train).returncode == 0
    result = client.publish(tmp_path / 'a', '--repo', 'our/sd18')
    assert result.returncode == 0, result.stderr
    files = hub.repos['models', 'our/sd18'].commits[hub.repos['models', 'our/sd18'].branches['main']]
    assert 'model-index' in files['README.md'].decode()
    config = json.loads(files['config.json'])
    assert (config['architecture'], config['num_classes'], config['pretrained_cfg']['tag']) == (
        'resnet18', 10, 'sd_digits')
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    plain = client.run('-c', "import timm; m = timm.create_model('hf-hub:our/sd18', pretrained=True); "
                             "print(type(m).__module__, m.num_classes, m.global_pool.pool_type)")
    assert plain.stdout == 'timm.models.resnet 10 max\n', plain.stderr
    refused = client.publish(tmp_path / 'a', '--bundle')
    assert refused.returncode == 2
    assert 'sd_resnet18.sd_digits' in last_line(refused)


def write_dry_run(client, run_folder):
    result = client.publish(run_folder, '--repo', 'our/sd', '--dry-run', token=False)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (run_folder / 'hub').iterdir()} == FILES
    return run_folder / 'hub'


def test_revision_private_and_no_token(hub, client, run_folder):
    refused = client.publish(run_folder, '--repo', 'our/new', token=False)
    assert refused.returncode == 2
    assert re.fullmatch(r'publish.py: error: --repo our/new can not be published: .*HF_TOKEN', last_line(refused))
    assert not hub.repos

    hub.fault = 'silent'
    silent = client.publish(run_folder, '--repo', 'our/new')
    assert silent.returncode == 2
    assert 'our/new can not be published' in last_line(silent)
    hub.fault = None

    result = client.publish(run_folder, '--repo', 'our/new', '--private', '--revision', 'half')
    assert result.returncode == 0, result.stderr
    assert "'hf-hub:our/new@half'" in result.stdout
    repo = hub.repos['models', 'our/new']
    assert 'model.safetensors' in repo.commits[repo.branches['half']]
    assert repo.private
    assert client.load('hf-hub:our/new@half').returncode != 0
    assert client.load('hf-hub:our/new@half', token=True).returncode == 0

    head = repo.branches['main']
    result = client.publish(run_folder, '--repo', 'our/new', '--create-pr')
    assert result.returncode == 0, result.stderr
    assert 'model.safetensors' in repo.commits[repo.branches['refs/pr/1']]
    assert repo.branches['main'] == head


NAME = 'sd_resnet20_cifar.svhn'  # not in the package


def good_weights():
    import timm

    import timm_sd  # noqa: F401
    torch.manual_seed(0)
    return safetensors.torch.save(timm.create_model('sd_resnet20_cifar').state_dict())


def test_registered_name_loads_from_the_organisation_then_from_the_cache(hub, client):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    assert client.load(NAME).stdout == 'loaded ResNetCifar\n'
    hub.shutdown()
    hub.server_close()
    assert client.load(NAME).stdout == 'loaded ResNetCifar\n'
    assert client.load(NAME, HF_HUB_OFFLINE='1').stdout == 'loaded ResNetCifar\n'


def pickle_only():
    import io
    buffer = io.BytesIO()
    torch.save({}, buffer)
    return {'pytorch_model.bin': buffer.getvalue()}


@pytest.mark.parametrize(('files', 'fault', 'words'), [
    (None, None, ['no such repository', 'HF_TOKEN']),
    ('private', None, ['private', 'HF_TOKEN']),
    ('pickle', None, ['no such file', 'safetensors']),
    ('truncated header', None, ['do not fit']),
    ('other tensors', None, ['do not fit', 'Missing key']),
    ('good', 'truncate', ['does not answer']),
    ('good', 'silent', ['does not answer']),
    ('good', '503', ['does not answer']),
])
def test_what_can_go_wrong_is_one_line_that_names_it(hub, client, files, fault, words):
    content = dict(good=good_weights, private=good_weights).get(files)
    if files == 'other tensors':
        content = lambda: safetensors.torch.save({'fc.weight': torch.zeros(3, 3)})  # noqa: E731
    if files == 'truncated header':
        content = lambda: good_weights()[:100]  # noqa: E731
    if files is not None:
        repo = hub.repo(f'our/{NAME}', private=files == 'private')
        repo.commit(pickle_only() if files == 'pickle' else {'model.safetensors': content()})
    hub.fault = fault
    timed = 'import time; s = time.monotonic()\ntry:\n    {}\nfinally: print(time.monotonic() - s)'
    code = f'import timm_sd, timm\n{timed.format(f"timm.create_model({NAME!r}, pretrained=True)")}'
    start = time.monotonic()
    result = client.run('-c', code)
    assert result.returncode == 1
    assert last_line(result).startswith(('OSError: ', 'RuntimeError: '))
    assert all(word in last_line(result) for word in (NAME, 'model.safetensors', *words)), last_line(result)
    if fault in ('silent', '503'):
        assert float(result.stdout) < 5
    assert time.monotonic() - start < 60


def test_missing_revision(hub, client):
    hub.repo(f'our/{NAME}').commit({'model.safetensors': good_weights()})
    code = f"import timm_sd, timm; timm.create_model({NAME!r}, pretrained=True, " \
           f"pretrained_cfg_overlay=dict(hf_hub_id='our/{NAME}@nowhere'))"
    result = client.run('-c', code)
    assert f'our/{NAME}@nowhere on the Hub: there is no such revision' in last_line(result)


def test_without_organisation_it_says_what_was_tried(client):
    del client.env['TIMM_SD_HUB_ORG']
    assert re.search(rf'{NAME}: the package has no such weights, and TIMM_SD_HUB_ORG', last_line(client.load(NAME)))


def test_data_set_with_a_revision(hub, client, tmp_path):
    from data import load_split
    folder = tmp_path / 'data'
    folder.mkdir()
    for split in ('train', 'test'):
        load_split('digits', split, None).to_parquet(str(folder / f'{split}-00000-of-00001.parquet'))
    repo = hub.repo('some/digits', 'datasets')
    repo.commit({path.name: path.read_bytes() for path in folder.iterdir()}, 'old')
    repo.commit({'README.md': b'empty'})
    train = [ROOT / 'bench' / 'train.py', '--model', 'sd_resnet20_cifar', '--img-size', '16', '--epochs', '1',
             '--threads', '1', '--no-amp', '--output', tmp_path / 'output', '--dataset']
    result = client.run(*train, 'some/digits@old')
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tmp_path / 'hf')
    streamed = client.run(*train, 'some/digits@old', '--streaming')
    assert streamed.returncode == 0, streamed.stderr
    errors = [json.loads(run.stdout.splitlines()[-1])['test_last'] for run in (result, streamed)]
    assert errors[0] == errors[1]
    assert not list((tmp_path / 'hf').rglob('*.arrow'))
    for dataset, words in (('some/digits@new', ['some/digits', 'new']), ('some/nothing', ['some/nothing', 'private'])):
        result = client.run(*train, dataset)
        assert result.returncode == 2
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert all(word in result.stderr for word in words), result.stderr
    shutil.rmtree(tmp_path / 'hf')
    hub.fault = 'silent'
    start = time.monotonic()
    result = client.run(*train, 'some/digits')
    assert 'unreachable' in result.stderr
    assert time.monotonic() - start < 40  # most of it imports

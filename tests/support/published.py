"""A finished run on its way to the Hub."""
import json
import shutil

import timm
import torch

from harness.run_folder import RunFolder, read_metadata
from support.commands import read_results, run_here, weights

FILES = {'model.safetensors', 'config.json', 'README.md', 'results.json', 'summary.csv', 'curves.png', 'gates.png'}
REPO = 'our/sd'
TRAIN = ['--epochs', '1', '--threads', '1', '--no-amp', '--experiment', 'a', '--output']


def change(folder, tensors=None, **results):
    """Makes it a run of other results, or of other tensors; `args` are added to its flags."""
    run, path = RunFolder(folder), folder / 'model.safetensors'
    old, metadata = run.read_results(), read_metadata(path)
    new = dict(old, **{**results, 'args': dict(old['args'], **results.get('args', {}))})
    said = {key: new.get(key, text) for key, text in metadata.items()}
    new['weights_sha256'] = run.write_weights(tensors or weights(folder), said)
    run.write_results(new)


def to_hub(folder, *args):
    result = run_here('publish.py', folder, *args)
    assert result.returncode == 0, result.stderr
    return result


def head(repo, branch='main'):
    return repo.commits[repo.branches[branch]]


def assert_loads(name, folder):
    state = timm.create_model(name, pretrained=True).state_dict()
    saved = weights(folder)
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in saved)


def other_run(folder, place, **results):
    """Another finished run: other weights, and a better or worse error."""
    shutil.copytree(folder, place)
    torch.manual_seed(1)
    change(place, {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in weights(folder).items()},
           seed=1, **results)
    return place


def repository(hub):
    return hub.repos['models', REPO]


def is_of(files, folder):
    """Whether weights, results and card are those of a run."""
    of_results = json.loads(files['results.json'])['seed'] == read_results(folder)['seed']
    of_weights = files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    of_card = f'| seed | {read_results(folder)["seed"]} |' in files['README.md'].decode()
    return of_weights and of_results and of_card


def refused_with_news(script, *args):
    """The error of a script that said something before it."""
    result = run_here(script, *args)
    assert (result.returncode, result.stdout) == (2, ''), result
    assert result.stderr.splitlines()[-1].startswith(f'{script}: error: ')
    assert 'Traceback' not in result.stderr
    return result.stderr.splitlines()[-1]

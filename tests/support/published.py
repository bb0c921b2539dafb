"""A finished run on its way to the Hub."""
import timm
import torch

from harness.run_folder import RunFolder, read_metadata
from support.commands import run_here, weights

FILES = {'model.safetensors', 'config.json', 'README.md', 'results.json', 'summary.csv', 'curves.png', 'gates.png'}
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

"""bench/publish.py: what it puts on the Hub loads back, and what it refuses."""
import json
import re
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image

import publish
import timm_sd
from support.commands import bench, refused, run_here, weights
from support.hub_server import Hub
from support.markdown import snippets
from support.published import FILES, TRAIN, assert_loads, change, head, to_hub


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """What is loaded in a test is kept for this test alone."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))


# --- onto the Hub, and back


def test_a_repository_holds_the_run_and_nothing_else(hub, signed_in, run_folder):
    result = to_hub(run_folder, '--repo', 'our/sd_resnet20_cifar.c100')
    repo = hub.repos['models', 'our/sd_resnet20_cifar.c100']
    files = head(repo)
    assert set(files) - {'.gitattributes'} == FILES
    for name in ('model.safetensors', 'summary.csv'):
        assert files[name] == (run_folder / name).read_bytes()
    assert not repo.private
    assert f'hf_hub_id: our/sd_resnet20_cifar.c100@{repo.branches["main"]}' in result.stdout
    assert Hub.TOKEN not in result.stdout + result.stderr
    assert 'model.safetensors: 100%' in result.stderr  # the progress bar
    config = json.loads(files['config.json'])
    assert config['architecture'] == 'sd_resnet20_cifar'
    assert config['label_names'] == [str(n) for n in range(10)]
    assert (config['pretrained_cfg']['tag'], config['pretrained_cfg']['license']) == ('c10', 'apache-2.0')
    assert config['pretrained_cfg']['input_size'] == [3, 8, 8]
    assert 'num_classes' not in config['model_args']  # transformers would give it twice


def test_no_path_of_this_machine_is_published(hub, signed_in, run_folder):
    change(run_folder, args=dict(data_dir='/home/me/data', output='/home/me/output', resume='/home/me/output/a'))
    to_hub(run_folder, '--repo', 'our/sd')
    files = head(hub.repos['models', 'our/sd'])
    assert not [name for name, content in files.items() if b'/home/me' in content]
    assert json.loads(files['results.json'])['args']['output'] is None


@pytest.mark.parametrize('place', ['secret/pets', './secret/pets', '{cwd}/secret/pets', 'secret/../secret/pets/'])
def test_a_folder_given_as_a_data_set_is_its_last_name(hub, signed_in, toy_folder, tmp_path, monkeypatch, place):
    """Also where it could be the name of one on the Hub."""
    shutil.copytree(toy_folder, tmp_path / 'secret' / 'pets')
    monkeypatch.chdir(tmp_path)
    result = run_here('train.py', '--model', 'sd_resnet20_cifar', '--img-size', '8', '--val-per-class', '3',
                      '--dataset', place.format(cwd=tmp_path), *TRAIN, tmp_path / 'output')
    assert result.returncode == 0, result.stderr
    to_hub(tmp_path / 'output' / 'a', '--repo', 'our/pets')
    files = head(hub.repos['models', 'our/pets'])
    assert not [name for name, content in files.items() if b'secret' in content]
    results = json.loads(files['results.json'])
    assert (results['dataset'], results['args']['dataset']) == ('pets', 'pets')
    assert results['changed_from_recipe']['dataset'] == 'pets'
    assert '- **Data set:** pets, a local folder' in files['README.md'].decode()


def test_publishing_again_changes_nothing(hub, signed_in, run_folder):
    to_hub(run_folder, '--repo', 'our/sd')
    repo = hub.repos['models', 'our/sd']
    oid, commits = repo.branches['main'], len(repo.commits)
    again = to_hub(run_folder, '--repo', 'our/sd')
    assert (repo.branches['main'], len(repo.commits)) == (oid, commits)
    assert oid in again.stdout


def test_the_printed_names_load_what_was_trained(hub, signed_in, run_folder):
    printed = to_hub(run_folder, '--repo', 'our/sd').stdout
    assert_loads(re.search(r"'(hf-hub:.*?)'", printed)[1], run_folder)
    assert_loads('hf-hub:' + re.search(r'hf_hub_id: (\S+)', printed)[1], run_folder)


def test_the_snippets_of_a_published_card_load_from_its_repository(hub, signed_in, run_folder):
    to_hub(run_folder, '--repo', 'our/sd')
    found = snippets(head(hub.repos['models', 'our/sd'])['README.md'].decode())
    assert len(found) == 4
    for snippet in found:
        assert 'hf-hub:our/sd' in snippet
        names = {}
        exec(snippet, names)
        saved, state = weights(run_folder), names['model'].state_dict()
        assert len(state) >= len(saved) - 2  # feature maps and embeddings take no classifier
        assert all(torch.equal(saved[key.removeprefix('model.')], tensor) for key, tensor in state.items())


def test_a_dry_run_writes_what_would_be_published(hub, run_folder):
    to_hub(run_folder, '--repo', 'our/sd', '--dry-run')
    assert {path.name for path in (run_folder / 'hub').iterdir()} == FILES
    assert_loads(f'local-dir:{run_folder / "hub"}', run_folder)
    assert hub.requests == []


def test_a_branch_of_a_private_repository(hub, signed_in, run_folder, monkeypatch):
    result = to_hub(run_folder, '--repo', 'our/new', '--private', '--revision', 'half')
    assert "'hf-hub:our/new@half'" in result.stdout
    repo = hub.repos['models', 'our/new']
    assert 'model.safetensors' in head(repo, 'half')
    assert 'model.safetensors' not in head(repo)
    assert repo.private
    assert_loads('hf-hub:our/new@half', run_folder)
    monkeypatch.delenv('HF_TOKEN')
    shutil.rmtree(run_folder.parent / 'cache')
    with pytest.raises(Exception, match='our/new'):
        timm.create_model('hf-hub:our/new@half', pretrained=True)


def test_a_pull_request_leaves_the_branch_alone(hub, signed_in, run_folder):
    before = hub.repo('our/new').commit({'README.md': b'theirs'})
    result = to_hub(run_folder, '--repo', 'our/new', '--create-pr')
    repo = hub.repos['models', 'our/new']
    assert 'model.safetensors' in head(repo, 'refs/pr/1')
    assert repo.branches['main'] == before
    assert repo.branches['refs/pr/1'] in result.stdout


# --- what goes on with the training


def method(model):
    gates = timm_sd.depth_gates(model)
    return gates.drop_path_rates[-1], gates.schedule, gates.mode, gates.scale


@pytest.mark.parametrize(('results', 'expected'), [
    ({}, (0.2, 'linear', 'batch', 'eval')),
    (dict(drop_path_rate=0.3, drop_path_schedule='uniform', drop_path_scale='train'),
     (0.3, 'uniform', 'batch', 'train')),
])
def test_our_network_goes_on_with_the_method_of_its_run(hub, signed_in, run_folder, results, expected):
    change(run_folder, **results)
    to_hub(run_folder, '--repo', 'our/sd')
    to_hub(run_folder, '--repo', 'our/sd', '--dry-run')
    for name in ('hf-hub:our/sd', f'local-dir:{run_folder / "hub"}'):
        assert method(timm.create_model(name, pretrained=True)) == expected
        assert method(timm.create_model(name, pretrained=True, num_classes=3)) == expected
        assert method(timm.create_model(name, pretrained=True, drop_path_rate=0.4)) == (0.4, *expected[1:])
        other = timm.create_model(name, pretrained=True, drop_path_mode='sample')
        assert method(other) == (*expected[:2], 'sample', 'train')


def as_sd_resnet18(folder):
    """Makes the run one of timm's own network, with another pooling."""
    model = timm.create_model('resnet18', num_classes=10, global_pool='max')
    change(folder, model.state_dict(), model='sd_resnet18', dataset='digits', blocks=8, expected_depth=6.,
           drop_path_rate=0.5, args=dict(img_size=32, model_kwargs=dict(global_pool='max')))


def test_timms_own_architecture_is_published_as_timms(hub, signed_in, run_folder):
    as_sd_resnet18(run_folder)
    to_hub(run_folder, '--repo', 'our/sd18')
    files = head(hub.repos['models', 'our/sd18'])
    assert 'model-index' in files['README.md'].decode()
    config = json.loads(files['config.json'])
    assert (config['architecture'], config['num_classes'], config['pretrained_cfg']['tag']) == (
        'resnet18', 10, 'sd_digits')
    assert config['pretrained_cfg']['input_size'] == [3, 32, 32]
    model = timm.create_model('hf-hub:our/sd18', pretrained=True)
    assert (type(model).__module__, model.num_classes, model.global_pool.pool_type) == ('timm.models.resnet', 10, 'max')
    assert_loads('hf-hub:our/sd18', run_folder)


def test_timms_own_network_is_plain_and_its_card_goes_on_with_the_method(hub, signed_in, run_folder):
    as_sd_resnet18(run_folder)
    to_hub(run_folder, '--repo', 'our/sd18')
    files = head(hub.repos['models', 'our/sd18'])
    model = timm.create_model('hf-hub:our/sd18', pretrained=True)
    assert timm_sd.depth_gates(model) is None
    assert not [module for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    timm_sd.add_stochastic_depth(model, **json.loads(files['config.json'])['stochastic_depth'])
    assert method(model) == (0.5, 'linear', 'batch', 'eval')
    (snippet,) = [text for text in snippets(files['README.md'].decode()) if 'add_stochastic_depth' in text]
    names = {}
    exec(snippet, names)
    assert method(names['model']) == method(model)


@pytest.mark.slow
@pytest.mark.parametrize('is_ours', [True, False])
def test_transformers_loads_it(run_folder, is_ours):
    import transformers

    if not is_ours:
        as_sd_resnet18(run_folder)
    to_hub(run_folder, '--repo', 'our/sd', '--dry-run')
    folder = str(run_folder / 'hub')
    timms = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    x = torch.randn(2, *timms.pretrained_cfg['input_size'])
    assert torch.equal(model(x).logits, timms(x))
    assert model.config.id2label == {index: str(index) for index in range(10)}
    if is_ours:
        assert method(model) == method(timms) == (0.2, 'linear', 'batch', 'eval')
    else:
        assert timm_sd.depth_gates(model) is None
    features = transformers.AutoModel.from_pretrained(folder)
    assert torch.equal(features(x).last_hidden_state, timms.forward_features(x))
    image = Image.new('RGB', tuple(x.shape[2:]), (200, 30, 90))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(timms))
    expected = timms(transform(image)[None]).softmax(1)[0]
    found = transformers.pipeline('image-classification', model=folder)(image, top_k=10)
    assert {int(row['label']): row['score'] for row in found} == \
        pytest.approx(dict(enumerate(expected.tolist())), abs=1e-6)


# --- into the package


def test_a_bundled_run_is_weights_in_the_package_and_a_card(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, 'CARDS', tmp_path / 'cards')
    monkeypatch.setattr(publish, 'PRETRAINED', tmp_path)
    change(run_folder, data=dict(hub='uoft-cs/cifar10', revision=None), args=dict(img_size=32))
    result = to_hub(run_folder, '--bundle')
    name = 'sd_resnet20_cifar.c10'
    assert result.stdout.startswith(f'bundled {name}: ')
    assert (tmp_path / f'{name}.safetensors').read_bytes() == (run_folder / 'model.safetensors').read_bytes()
    assert {path.name for path in (tmp_path / 'cards' / name).iterdir()} == FILES - {'model.safetensors', 'config.json'}
    assert f"timm.create_model('{name}', pretrained=True)" in (tmp_path / 'cards' / name / 'README.md').read_text()


# --- what is refused


def test_without_a_token_nothing_is_published(hub, run_folder):
    said = refused('publish.py', run_folder, '--repo', 'our/new')
    assert 'our/new can not be published: the Hub answers 401; log in with hf auth login, or set HF_TOKEN' in said
    assert not hub.repos


def test_the_package_holds_no_other_tag(run_folder):
    as_sd_resnet18(run_folder)
    assert 'sd_resnet18.sd_digits' in refused('publish.py', run_folder, '--bundle')


@pytest.mark.parametrize(('changed', 'words'), [
    (dict(drop_path_mode='sample'), 'was not trained with whole blocks dropped'),
    (dict(blocks=None), 'was not trained with whole blocks dropped'),
    (None, 'is no finished run'),
])
def test_runs_that_are_not_published(hub, signed_in, run_folder, changed, words):
    if changed is None:
        (run_folder / 'results.json').unlink()
    else:
        change(run_folder, **changed)
    assert words in refused('publish.py', run_folder, '--repo', 'our/new')
    assert not hub.repos


@pytest.mark.parametrize(('file', 'content', 'words'), [
    ('results.json', b'{"model": "sd_res', 'results.json can not be read'),
    ('results.json', bytes(range(256)), 'results.json can not be read'),
    ('results.json', b'{}', 'results.json lacks args'),
    ('summary.csv', b'epoch,train', 'summary.csv lacks train_loss'),
    ('summary.csv', None, 'summary.csv can not be read'),
    ('summary.csv', b'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr,train_seconds\n0,2,2,1.5,9,0.1,1\n',
     'holds files of two runs: the last validation error of summary.csv is 98.5'),
    ('model.safetensors', None, 'it has no model.safetensors'),
])
@pytest.mark.parametrize('target', [['--repo', 'our/new'], ['--repo', 'our/new', '--dry-run'], ['--bundle']])
def test_a_run_that_is_not_whole_is_not_published(
        hub, signed_in, run_folder, file, content, words, target, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, 'PRETRAINED', tmp_path / 'pretrained')
    monkeypatch.setattr(publish, 'CARDS', tmp_path / 'cards')
    (run_folder / file).unlink()
    if content is not None:
        (run_folder / file).write_bytes(content)
    said = refused('publish.py', run_folder, *target)
    assert words in said
    assert str(run_folder) in said
    assert not hub.repos
    assert not (run_folder / 'hub').exists()
    assert not (tmp_path / 'cards').exists()


def test_the_first_question_has_a_time_limit(hub, signed_in, run_folder, monkeypatch):
    asked = []

    def repo_info(self, repo_id, timeout=None):
        asked.append((repo_id, timeout))
        raise TimeoutError('no answer')
    monkeypatch.setattr(huggingface_hub.HfApi, 'repo_info', repo_info)
    assert 'our/new can not be published: no answer' in refused('publish.py', run_folder, '--repo', 'our/new')
    assert asked == [('our/new', 3)]
    assert hub.requests == []  # the questions that follow have no limit


def test_where_to_is_asked_for(run_folder):
    assert '--repo is not given' in refused('publish.py', run_folder)


# --- in processes of their own


@pytest.mark.slow
def test_a_silent_hub_is_given_up(hub, signed_in, run_folder):
    hub.fail('silent')
    result = bench('publish.py', run_folder, '--repo', 'our/new', timeout=240)  # it would be silent for 600
    assert result.returncode == 2
    assert 'our/new can not be published' in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_plain_timm_loads_what_was_trained_with_the_plugin(hub, signed_in, tmp_path):
    result = run_here('train.py', '--model', 'sd_resnet18', '--model-kwargs', 'global_pool=max', '--img-size', '32',
                      *TRAIN, tmp_path)
    assert result.returncode == 0, result.stderr
    result = bench('publish.py', tmp_path / 'a', '--repo', 'our/trained18')
    assert result.returncode == 0, result.stderr
    code = f"""
import sys, timm, torch, safetensors.torch
model = timm.create_model('hf-hub:our/trained18', pretrained=True)
saved = safetensors.torch.load_file({str(tmp_path / 'a' / 'model.safetensors')!r})
assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
drops = any(isinstance(module, timm.layers.DropPath) for module in model.modules())
print(type(model).__module__, model.num_classes, model.global_pool.pool_type, drops, 'timm_sd' in sys.modules)
"""
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert loaded.stdout == 'timm.models.resnet 10 max False False\n', loaded.stderr

"""What a run says of its data is what it was given, wherever it is written: never a guess, never a local path."""
import json
import os
import shutil

import datasets
import pytest
import safetensors
from accelerate import Accelerator
from huggingface_hub import HfApi

import publish
from harness.data.in_memory import load_image_set
from harness.data.settings import ImageSettings, SplitSettings
from harness.data.sources import SourceSettings
from harness.data.splits import check_same_data, load_splits
from harness.errors import UserError
from harness.recipes import parse_train_flags, read_recipe
from support.commands import ROOT, read_results, refused, run_here
from support.data import opened, write_classes
from support.published import change

FLAGS = ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '1', '-b', '8', '--threads', '1', '--no-amp',
         '--val-per-class', '2', '--experiment', 'a']
SHARED = ROOT.parent / 'shared' / 'data'


@pytest.fixture(scope='module')
def pets(tmp_path_factory):
    """Ten classes, as CIFAR-10 has, that aren't CIFAR-10."""
    return write_classes(tmp_path_factory.mktemp('at home') / 'my pets', classes=10, train=6, test=3)


@pytest.fixture(scope='module')
def run(pets, tmp_path_factory):
    """A training that has learned some of them."""
    output = tmp_path_factory.mktemp('output')
    result = run_here('train.py', '-c', 'cifar10_short', '--data-dir', pets, *FLAGS, '--epochs', '6', '--lr', '0.1',
                      '--output', output)
    assert result.returncode == 0, result.stderr
    return output / 'a'


def as_pictures(source, folder):
    """A parquet folder as class folders, FOLDER/SPLIT/CLASS/*.png."""
    for split in ('train', 'test'):
        rows = opened(source, split)
        for number, (image, label) in enumerate(zip(rows.rows['image'], rows.labels.tolist(), strict=True)):
            file = folder / split / rows.class_names[label] / f'{number}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image['bytes'])
    return folder


def test_a_folder_of_ten_classes_is_not_cifar10(run):
    results = read_results(run)
    assert results['dataset'] == 'my pets'
    assert results['recipe'] == 'cifar10_short'
    assert results['data'].keys() == {'folder', 'fingerprint', 'content'}
    assert results['data']['folder'] == 'my pets'
    with safetensors.safe_open(run / 'model.safetensors', 'pt') as file:
        metadata = file.metadata()
    assert metadata['dataset'] == 'my pets'
    assert json.loads(metadata['data']) == results['data']
    assert json.loads(metadata['label_names']) == results['label_names'] == [f'class {n}' for n in range(10)]


def test_it_is_not_bundled(run, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, 'PRETRAINED', tmp_path)
    monkeypatch.setattr(publish, 'CARDS', tmp_path)
    said = refused('publish.py', run, '--bundle')
    assert 'the package holds no sd_resnet20_cifar.sd_my_pets' in said
    assert not list(tmp_path.iterdir())


def test_data_is_bundled_only_if_a_recipe_of_the_package_knows_it(run, tmp_path, monkeypatch):
    """A fingerprint that a user gave says nothing about CIFAR-10, and the tag promises its classes and its size."""
    monkeypatch.setattr(publish, 'PRETRAINED', tmp_path / 'pretrained')
    monkeypatch.setattr(publish, 'CARDS', tmp_path / 'cards')
    known = read_recipe('cifar10')['fingerprint']
    for number, (data, changed, words) in enumerate((
            (dict(folder='x', fingerprint='f', content='0' * 64), {}, "knows 'x' as a copy of uoft-cs/cifar10"),
            (dict(folder='x', fingerprint='f', content=known), {}, "c10 stands for (10, 3, 32, 'test')"),
            (dict(hub='uoft-cs/cifar10', revision=None), {}, 'stands for'),
            (dict(hub='uoft-cs/cifar10', revision=None), dict(label_names=['a', 'b']), 'stands for'),
            (dict(hub='uoft-cs/cifar10', revision=None), dict(test_split='train'), 'stands for'))):
        folder = tmp_path / str(number)
        shutil.copytree(run, folder)
        change(folder, **dict(changed, dataset='uoft-cs/cifar10', model='sd_resnet20_cifar.c10', data=data,
                              args=dict(img_size=32) if changed else {}))
        assert words in refused('publish.py', folder, '--bundle')
    assert not list(tmp_path.glob('pretrained/*')) + list(tmp_path.glob('cards/*'))


def test_its_card_says_what_it_is(run, pets):
    result = run_here('publish.py', run, '--repo', 'me/pets', '--dry-run')
    assert result.returncode == 0, result.stderr
    card = (run / 'hub' / 'README.md').read_text()
    assert 'Model card for sd_resnet20_cifar.sd_my_pets' in card
    assert '**Data set:** my pets, a local folder' in card
    assert 'huggingface.co/datasets' not in card
    assert 'The paper reports no error of this network on these data.' in card
    assert "**Not the paper's recipe.** By this project's recipe, `cifar10_short`" in card
    for path in (run / 'hub').iterdir():
        assert str(os.path.dirname(pets)).encode() not in path.read_bytes(), path
        assert str(run.parent).encode() not in path.read_bytes(), path


def test_a_run_that_does_not_say_what_its_data_was_is_not_published(run, tmp_path):
    shutil.copytree(run, tmp_path / 'old')
    results = read_results(run)
    del results['data']
    (tmp_path / 'old' / 'results.json').write_text(json.dumps(dict(results, dataset='uoft-cs/cifar10')))
    for target in (['--bundle'], ['--repo', 'me/old', '--dry-run']):
        assert 'does not say what its data was' in refused('publish.py', tmp_path / 'old', *target)


@pytest.mark.parametrize('how', ['dataset', 'data_dir', 'both', 'recipe', 'model'])
def test_published_results_hold_no_local_path(pets, run, tmp_path, how):
    flags = {'dataset': ['--dataset', pets], 'data_dir': ['--data-dir', pets], 'recipe': ['--data-dir', pets],
             'both': ['--dataset', pets, '--data-dir', pets, '--fingerprint', read_results(run)['data']['content']],
             'model': ['--data-dir', pets]}[how]
    if how == 'recipe':
        (tmp_path / 'mine.yaml').write_text('hflip: 0.25\n')
        flags += ['-c', tmp_path / 'mine.yaml']
    if how == 'model':
        (tmp_path / 'net').mkdir()
        (tmp_path / 'net' / 'config.json').write_text(json.dumps(dict(architecture='sd_resnet20_cifar')))
        flags += ['--model', f'local-dir:{tmp_path / "net"}', '--drop-path', '0.2']
    args = [*FLAGS, *flags] if how != 'model' else [*FLAGS[2:], *flags]
    result = run_here('train.py', *args, '--output', tmp_path / 'output')
    assert result.returncode == 0, result.stderr
    assert run_here('publish.py', tmp_path / 'output' / 'a', '--repo', 'me/x', '--dry-run').returncode == 0
    for path in (tmp_path / 'output' / 'a' / 'hub').rglob('*.*'):
        content = path.read_bytes()
        for local in (tmp_path, os.path.dirname(pets)):
            assert str(local).encode() not in content, path


def test_copies_of_a_data_set_have_one_content_and_others_another(pets, tmp_path):
    pictures = as_pictures(pets, tmp_path / 'as pictures')

    def content(folder, **kwargs):
        return load_splits(SourceSettings(data_dir=str(folder), **kwargs), SplitSettings(val_per_class=[2]),
                           ImageSettings(), Accelerator(cpu=True)).record

    ours, theirs = content(pets), content(pictures)
    assert ours['data']['content'] == theirs['data']['content']
    assert ours['data']['fingerprint'] != theirs['data']['fingerprint']
    assert theirs['dataset'] == 'as pictures'
    for known in (ours['data']['content'], theirs['data']['fingerprint']):
        assert content(pictures, dataset='our/pets', fingerprint=known)['dataset'] == 'our/pets'
    assert content(pictures, dataset='our/pets', fingerprint='0' * 64)['dataset'] == 'as pictures'
    # One picture in another class, one less, a split exchanged, one pixel: another data set.
    victim = next((pictures / 'train' / 'class 3').iterdir())
    seen = {ours['data']['content']}

    def changed():
        found = content(pictures)['data']['content']
        assert found not in seen
        seen.add(found)

    moved = victim.replace(pictures / 'train' / 'class 4' / 'moved.png')
    changed()
    moved.replace(pictures / 'test' / 'class 3' / 'moved.png')
    changed()
    (pictures / 'test' / 'class 3' / 'moved.png').unlink()
    changed()
    shutil.copy(next((pictures / 'train' / 'class 5').iterdir()), victim)
    changed()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason='the data sets lie in ../shared/data')
@pytest.mark.parametrize('recipe', ['cifar10', 'cifar10_short', 'cifar10_weights', 'cifar10_1202', 'cifar100',
                                    'cifar100_weights'])
def test_recipes_know_their_data_set(recipe):
    args = parse_train_flags(['-c', recipe])
    source = SourceSettings(data_dir=str(SHARED / recipe.partition('_')[0]), dataset=args.dataset,
                            target_key=args.target_key, fingerprint=args.fingerprint)
    record = load_splits(source, SplitSettings(val_per_class=args.val_per_class), ImageSettings(),
                         Accelerator(cpu=True)).record
    assert record['dataset'] == read_recipe(recipe)['dataset']
    assert record['data']['folder'] == recipe.partition('_')[0]


def test_a_hub_data_set_is_recorded_with_its_commit(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    repo = hub.repo('some/pictures', 'datasets')
    for branch, count in (('old', 5), ('main', 4)):
        folder = tmp_path / branch
        write_classes(folder, classes=2, train=count, test=2)
        repo.commit({path.name: path.read_bytes() for path in folder.rglob('*.parquet')}, branch)
    for name, branch, count in (('some/pictures', 'main', 4), ('some/pictures@old', 'old', 5)):
        result = run_here('train.py', '--dataset', name, *FLAGS, '--experiment', branch, '--output', tmp_path)
        assert result.returncode == 0, result.stderr
        results = read_results(tmp_path / branch)
        assert results['dataset'] == 'some/pictures'
        assert results['data']['hub'] == 'some/pictures'
        assert results['images']['train'] + results['images']['val'] == 2 * count
        assert results['data']['revision'] == HfApi().dataset_info('some/pictures', revision=branch).sha


# --- going on, and classes by name


def test_a_run_does_not_go_on_with_other_data(pets, run, tmp_path):
    shutil.copytree(pets, tmp_path / 'moved')
    shutil.copytree(run, tmp_path / 'a')
    (tmp_path / 'a' / 'results.json').unlink()
    args = ['-c', 'cifar10_short', *FLAGS, '--epochs', '6', '--lr', '0.1', '--output', tmp_path, '--resume', 'auto',
            '--data-dir']
    assert run_here('train.py', *args, tmp_path / 'moved').returncode == 0
    (tmp_path / 'a' / 'results.json').unlink()
    write_classes(tmp_path / 'other', classes=10, train=7, test=3)
    result = run_here('train.py', *args, tmp_path / 'other')
    assert result.returncode == 2
    assert 'the data is not that of the epochs before: its content is' in result.stderr.splitlines()[-1]
    assert not (tmp_path / 'a' / 'results.json').exists()


def test_a_folder_does_not_become_a_hub_data_set_on_the_way():
    """Of large images, whose content nobody has looked at."""
    before, now = dict(folder='x', fingerprint='f'), dict(hub='some/pictures', revision='r')
    for pair in ((before, now), (now, before)):
        with pytest.raises(UserError, match='nothing says that they are the same'):
            check_same_data(*pair)
    check_same_data({}, now)  # an older version's
    check_same_data(dict(before, content='c'), dict(now, content='c'))


def renamed(pets, folder, names):
    """Its test pictures in class folders of other names, which sort otherwise."""
    as_pictures(pets, folder)
    for old, new in names.items():
        (folder / 'test' / old).rename(folder / 'test' / new)
    shutil.rmtree(folder / 'train')
    return folder


def validated(run, *args):
    result = run_here('validate.py', '--checkpoint', run / 'model.safetensors', *args)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)['top1_err']


def test_classes_of_another_order_are_mapped_by_name(run, pets, tmp_path):
    """Without their names almost all would be wrong: no class keeps its number."""
    rows = opened(pets, 'test')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=rows.class_names[::-1]))
    (tmp_path / 'data').mkdir()
    datasets.Dataset.from_dict(
        dict(image=list(rows.rows['image']), label=[9 - label for label in rows.labels.tolist()]),
        features=features).to_parquet(str(tmp_path / 'data' / 'test-00000-of-00001.parquet'))
    for path in (['--in-memory'], ['--no-in-memory', '-j', '1'], ['--no-in-memory', '--streaming', '-j', '1']):
        assert validated(run, '--data-dir', tmp_path / 'data', *path) == validated(run, '--data-dir', pets, *path)
    assert validated(run, '--data-dir', tmp_path / 'data') == read_results(run)['test_best']['top1_err'] < 80


def test_some_of_the_classes_are_enough_and_others_are_refused(run, pets, tmp_path):
    some = renamed(pets, tmp_path / 'some', {})
    for name in ('class 0', 'class 7'):
        shutil.rmtree(some / 'test' / name)
    validated(run, '--data-dir', some)
    other = renamed(pets, tmp_path / 'other', {'class 3': 'class three'})
    said = refused('validate.py', '--checkpoint', run / 'model.safetensors', '--data-dir', other)
    assert '1 classes that' in said
    assert "'class three'" in said


def test_bundled_weights_know_their_classes(tmp_path):
    pets = write_classes(tmp_path / 'pets', classes=10, size=32, test=1)
    said = refused('validate.py', '--model', 'sd_resnet20_cifar', '--pretrained', '--data-dir', pets)
    assert "10 classes that sd_resnet20_cifar does not know, such as 'class 0'; it knows 10, such as 'airplane'" in said


def test_the_content_does_not_depend_on_the_size_asked_for(pets):
    assert load_image_set(opened(pets), 8).content == load_image_set(opened(pets), 16).content

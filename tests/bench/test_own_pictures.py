"""One's own pictures in class folders: every usual tree, however few there are, and what is no such tree."""
import shutil

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from harness.data.settings import ImageSettings, SplitSettings
from harness.data.sources import SourceSettings, open_data
from harness.data.splits import load_splits
from support.commands import read_results, refused, run_here
from support.data import opened, write_classes

OWN = ['-c', 'own', '--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '1', '-b', '4',
       '--threads', '1', '--no-amp', '--experiment', 'a']


def write_tree(root, **classes):
    """Class folders of so many pictures each; 'a__b' is the folder a/b."""
    for number, (name, count) in enumerate(classes.items()):
        place = root / name.replace('__', '/')
        place.mkdir(parents=True)
        for picture in range(count):
            pixels = np.random.default_rng(100 * number + picture).integers(0, 256, (12, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f'{picture}.png')
    return root


def images(root, **flags):
    """The numbers of images of a run of the recipe, the data set's name, and what was held out."""
    loaded = load_splits(SourceSettings(data_dir=str(root)), SplitSettings(
        val_split='auto', test_split='auto', val_fraction=0.1), ImageSettings(in_memory=False), Accelerator(cpu=True))
    return {name: len(rows) for name, rows in loaded.images.items()}, loaded


@pytest.mark.parametrize(('tree', 'sizes', 'selects', 'held_out'), [
    (dict(cat=30, dog=20), (45, 5, 5), False, '10 % of each class, and tested: the last epoch counts'),
    (dict(train__cat=30, train__dog=20), (45, 5, 5), False, '10 % of each class, and tested: the last epoch counts'),
    (dict(train__cat=3, train__dog=4, val__cat=2, val__dog=1), (7, 3, 3), False,
     'validation split, and tested: the last epoch counts'),
    (dict(train__cat=30, train__dog=20, test__cat=2, test__dog=1), (45, 5, 3), True, '10 % of each class'),
    (dict(Training__cat=3, Training__dog=4, valid__cat=2, valid__dog=1, Testing__cat=2, Testing__dog=2), (7, 3, 4),
     True, 'validation split'),
    (dict(Train__cat=3, Train__dog=4, Test__cat=2, Test__dog=2), (5, 2, 4), True, '10 % of each class')])
def test_usual_trees(tmp_path, tree, sizes, selects, held_out):
    found, loaded = images(write_tree(tmp_path / 'pets', **tree))
    assert tuple(found.values()) == sizes
    assert loaded.class_names == ['cat', 'dog']
    assert loaded.selects is selects
    assert loaded.record['held_out'] == held_out
    assert loaded.record['dataset'] == 'pets'


@pytest.mark.parametrize('per_class', [1, 2, 3])
def test_few_pictures_train_too(tmp_path, per_class):
    """Of a class with one picture none is held out."""
    root = write_tree(tmp_path / 'pets', cat=per_class, dog=per_class, emu=4)
    result = run_here('train.py', *OWN, '--data-dir', root, '--output', tmp_path)
    assert result.returncode == 0, result.stderr
    assert '3 classes: cat, dog, emu' in result.stderr.splitlines()[1]
    results = read_results(tmp_path / 'a')
    held = 1 if per_class == 1 else 3
    assert results['images'] == dict(train=4, val=held, test=held)  # a partial batch is left out
    assert results['label_names'] == ['cat', 'dog', 'emu']
    for picture in ('samples.png', 'mistakes.png'):
        assert len(Image.open(tmp_path / 'a' / picture).convert('L').getcolors()) > 10


def test_fewer_pictures_than_a_batch_are_one_batch(tmp_path):
    root = write_tree(tmp_path / 'pets', cat=5, dog=5)
    result = run_here('train.py', *OWN, '--data-dir', root, '-b', '64', '--output', tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_results(tmp_path / 'a')['images'] == dict(train=8, val=2, test=2)


@pytest.mark.parametrize(('spoil', 'words'), [
    (lambda root: shutil.rmtree(root / 'train' / 'dog'), ["one class, 'cat'", 'a folder of its own']),
    (lambda root: (root / 'train' / 'emu').mkdir(), ['train/emu is a class folder without a picture', 'fill it']),
    (lambda root: (root / 'train' / 'emu').mkdir() or (root / 'train' / 'emu' / 'a.heic').write_bytes(b'x'),
     ['train/emu is a class folder without a picture', '.jpg']),
    (lambda root: shutil.copy(root / 'train' / 'cat' / '0.png', root / 'train'), ['train/0.png lies beside the class']),
    (lambda root: (root / 'train' / 'cat' / '0.png').unlink() or (root / 'train' / 'cat' / '0.png').symlink_to('gone'),
     ['0.png can not be read', 'No such file']),
    (lambda root: shutil.copytree(root / 'val', root / 'validation'), ['val/ and validation/ are the split']),
    (lambda root: (root / 'val' / 'cat').rename(root / 'val' / 'lion'), ["training does not know, such as 'lion'"]),
    (lambda root: shutil.rmtree(root / 'train'), ["no split 'train'", 'validation']),
    (lambda root: (shutil.rmtree(root / 'train'), shutil.rmtree(root / 'val')), ['can not be read'])])
def test_what_is_no_such_tree_is_one_line(tmp_path, spoil, words):
    root = write_tree(tmp_path / 'pets', train__cat=4, train__dog=4, val__cat=2)
    spoil(root)
    said = refused('train.py', *OWN, '--data-dir', root, '--output', tmp_path / 'out')
    assert all(word in said for word in words), said
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(('tree', 'words'), [
    (dict(training_set__cat=2, training_set__dog=2, test_set__cat=2, test_set__dog=2),
     ['test_set/, training_set/ hold the folders cat, dog: if they are splits, call them train/']),
    (dict(train=3, test=2), ['test holds pictures without class folders; put each class into a folder'])])
def test_splits_are_not_taken_for_classes(tmp_path, tree, words):
    said = refused('train.py', *OWN, '--data-dir', write_tree(tmp_path / 'pets', **tree), '--output', tmp_path / 'out')
    assert all(word in said for word in words), said


def test_classes_may_be_called_like_splits(tmp_path):
    """Vehicles."""
    assert opened(write_tree(tmp_path / 'vehicles', car=2, train=2)).class_names == ['car', 'train']


def test_files_that_tools_left_are_no_pictures(tmp_path):
    root = write_tree(tmp_path / 'pets', cat=2, dog=2, **{'cat__.ipynb_checkpoints': 1})
    shutil.copy(root / 'cat' / '0.png', root / 'dog' / '._0.png')
    assert opened(root).labels.tolist() == [0, 0, 1, 1]


def test_shares_and_numbers_are_not_held_out_both(tmp_path):
    """What the command line says goes before the recipe."""
    root = write_tree(tmp_path / 'pets', cat=20, dog=20)
    result = run_here('train.py', *OWN, '--val-per-class', '5', '--data-dir', root, '--output', tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_results(tmp_path / 'a')['held_out'] == '[5] of each class, and tested: the last epoch counts'
    said = refused('train.py', *OWN, '--val-per-class', '5', '--val-fraction', '0.2', '--data-dir', root)
    assert 'hold out twice' in said
    said = refused('train.py', *OWN, '--streaming', '--epoch-size', '8', '--data-dir', root)
    assert '--epoch-size 8 is for streams' in said


def test_a_split_that_lacks_a_class_keeps_the_others_numbers(tmp_path):
    """By their own order its dogs would be cats."""
    _, loaded = images(write_tree(tmp_path / 'pets', train__cat=4, train__dog=4, train__emu=4, val__dog=2, val__emu=1))
    assert loaded.images['val'].labels.tolist() == [1, 1, 2]


def test_hidden_folders_are_no_classes_and_nested_ones_belong_to_theirs(tmp_path):
    root = write_tree(tmp_path / 'pets', train__cat=2, train__cat__siamese=2, train__dog=1, **{'train__.cache': 1})
    found = opened(root)
    assert found.class_names == ['cat', 'dog']
    assert found.labels.tolist() == [0] * 4 + [1]


def test_pictures_are_opened_in_memory_too(tmp_path):
    root = write_tree(tmp_path / 'pets', train__cat=6, train__dog=6, test__cat=2, test__dog=2)
    result = run_here('train.py', *OWN, '--in-memory', '--data-dir', root, '--output', tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_results(tmp_path / 'a')['images'] == dict(train=10, val=2, test=4)


def test_the_fingerprint_is_of_names_sizes_and_classes(tmp_path):
    def of(root):
        return open_data(SourceSettings(data_dir=str(root)), Accelerator(cpu=True)).origin['fingerprint']

    first, second = (write_tree(tmp_path / name, train__cat=2, train__dog=2) for name in ('first', 'second'))
    before = of(first)
    assert of(second) == before
    (second / 'notes.txt').write_text('no picture')
    assert of(second) == before
    (second / 'train' / 'dog' / '0.png').write_bytes(b'longer or shorter')
    assert of(second) != before
    (first / 'train' / 'dog').rename(first / 'train' / 'hound')
    assert of(first) != before


def test_the_picture_of_a_readme_beside_parquet_files_is_no_data(tmp_path):
    root = write_classes(tmp_path / 'repo', classes=2, train=3)
    write_tree(tmp_path / 'repo', assets=1)
    assert len(opened(root).labels) == 6


def test_a_folder_called_digits_does_not_hide_scikit_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(write_tree(tmp_path, digits__cat=1, digits__dog=1))
    assert open_data(SourceSettings('digits'), Accelerator(cpu=True)).origin == dict(package='scikit-learn')
    assert open_data(SourceSettings(data_dir='digits'), Accelerator(cpu=True)).origin['folder'] == 'digits'

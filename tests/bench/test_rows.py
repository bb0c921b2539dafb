"""Every row passes one check, whichever way its data comes: one line, and where it can be known before training."""
import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from support.commands import read_results, refused, run_here
from support.data import write_classes

PLAIN = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog']))
FLAGS = ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '1', '-b', '4', '--threads', '1', '--no-amp',
         '--val-per-class', '1', '--experiment', 'a']
PATHS = {'memory': ['--in-memory'], 'files': ['--no-in-memory', '-j', '1'],
         'stream': ['--no-in-memory', '-j', '1', '--streaming', '--val-split', 'test', '--epoch-size', '8']}


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, 'PNG')
    return dict(bytes=buffer.getvalue(), path='good.png')


def write(folder, bad=None, split='train', features=PLAIN, labels=None, **columns):
    """Twelve training and six test pictures; the second to last row of `split` is another one."""
    folder.mkdir(parents=True)
    for name, count in (('train', 12), ('test', 6)):
        rows = dict(image=[png(20 * row) for row in range(count)],
                    label=[row % 2 for row in range(count)] if labels is None else (labels * count)[:count], **columns)
        if bad is not None and name == split:
            key, value = bad
            rows[key][-2] = value
        path = folder / f'{name}-00000-of-00001.parquet'
        if bad == NO_BYTES:  # `datasets` refuses to write it; other writers don't
            pq.write_table(pa.Table.from_pydict(rows, schema=features.arrow_schema), path)
        else:
            datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return folder


NO_BYTES = 'image', dict(bytes=None, path=None)
BAD = {'no image': ('image', None), 'no bytes': NO_BYTES,
       'damaged image': ('image', dict(bytes=png()['bytes'][:100], path='bad.png')), 'no label': ('label', None),
       'label -1': ('label', -1)}
WORDS = {'no image': ('row {} has no image', 'image of row {} is missing'),
         'no bytes': ('row {} has no image', 'image of row {} is missing'), 'damaged image': ('bad.png is damaged',),
         'no label': ('row {} has no label',), 'label -1': ('row {} has the label -1',)}


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('kind', BAD)
def test_a_bad_row_is_named_in_one_line(tmp_path, path, split, kind):
    write(tmp_path / 'data', BAD[kind], split)
    result = run_here('train.py', '--data-dir', tmp_path / 'data', *FLAGS, *PATHS[path], '--output', tmp_path / 'out')
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    row = dict(train=10, test=4)[split]
    assert line.startswith('train.py: error: ') or path == 'stream', result.stderr
    assert f"split '{split}'" in line
    assert any(words.format(row) in line for words in WORDS[kind]), line
    assert 'Traceback' not in result.stderr
    # Files are decoded only when it is their turn; all else is known before anything is written.
    if path == 'memory' or path == 'files' and kind != 'damaged image':
        assert not (tmp_path / 'out').exists()


def test_a_label_beyond_the_classes_is_named(tmp_path):
    """`datasets` itself refuses to write one; other writers don't."""
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    folder = write(tmp_path / 'data', features=features, labels=[0, 1, 2])
    for file in folder.glob('*.parquet'):
        named = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['a', 'b']))
        table = datasets.Dataset.from_parquet(str(file)).data.table
        pq.write_table(table.replace_schema_metadata(named.arrow_schema.metadata), file)
    for path in PATHS:
        result = run_here('train.py', '--data-dir', folder, *FLAGS, *PATHS[path], '--output', tmp_path / 'out')
        assert result.returncode == 2
        assert 'has the label 2, where classes go from 0 to 1' in result.stderr.strip().splitlines()[-1], path


@pytest.mark.parametrize('path', ['memory', 'files'])
@pytest.mark.parametrize(('kind', 'labels', 'names'), [
    ('string', ['dog', 'cat', 'emu'], ['cat', 'dog', 'emu']), ('int32', [30, 0, 4], ['0', '4', '30']),
    ('bool', [True, False], ['False', 'True'])])
def test_plain_columns_are_encoded_in_their_order(tmp_path, path, kind, labels, names):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value(kind))
    folder = write(tmp_path / 'data', features=features, labels=labels)
    result = run_here('train.py', '--data-dir', folder, *FLAGS, *PATHS[path], '--output', tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_results(tmp_path / 'a')['label_names'] == names


@pytest.mark.parametrize(('columns', 'flags', 'words'), [
    (dict(caption=('string', [f'picture {row // 1.5}' for row in range(12)])), ['--target-key', 'caption'],
     ["column 'caption' holds 8 different values in 12 rows", '--target-key']),
    (dict(size=('int64', [1] * 12)), ['--target-key', 'size'], ["one class, '1'", '--target-key']),
    (dict(weight=('float32', [1.] * 12)), ['--target-key', 'weight'], ['--target-key', "'weight'", 'weight (float32)']),
    ({}, ['--input-key', 'label'], ['--input-key', "'label'", 'type Image'])])
def test_columns_that_are_no_classes(tmp_path, columns, flags, words):
    folder = tmp_path / 'data'
    folder.mkdir()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['cat', 'dog']),
                                 **{name: datasets.Value(kind) for name, (kind, _) in columns.items()})
    for split in ('train', 'test'):
        rows = dict(image=[png(row) for row in range(12)], label=[row % 2 for row in range(12)],
                    **{name: values for name, (_, values) in columns.items()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f'{split}-00000-of-00001.parquet'))
    said = refused('train.py', '--data-dir', folder, *FLAGS, *flags, '--output', tmp_path / 'out')
    assert all(word in said for word in words), said
    assert not (tmp_path / 'out').exists()


def test_images_in_a_list_are_refused(tmp_path):
    features = datasets.Features(images=[datasets.Image()], label=datasets.ClassLabel(names=['cat', 'dog']))
    (tmp_path / 'data').mkdir()
    for split in ('train', 'test'):
        datasets.Dataset.from_dict(dict(images=[[png()]] * 4, label=[0, 1] * 2), features=features).to_parquet(
            str(tmp_path / 'data' / f'{split}-00000-of-00001.parquet'))
    for flags in ([], ['--input-key', 'images']):
        said = refused('train.py', '--data-dir', tmp_path / 'data', *FLAGS, *flags, '--output', tmp_path / 'out')
        assert '--input-key' in said
        assert 'images (List)' in said


@pytest.mark.parametrize(('kind', 'without'), [('string', ''), ('string', None), ('int64', -1), ('int64', None)])
def test_a_plain_column_without_a_label_is_named(tmp_path, kind, without):
    """-1 is how the Hub marks the images of a hidden test."""
    features = datasets.Features(image=datasets.Image(), label=datasets.Value(kind))
    labels = ['a', 'b'] if kind == 'string' else [0, 1]
    folder = write(tmp_path / 'data', ('label', without), features=features, labels=labels)
    said = refused('train.py', '--data-dir', folder, *FLAGS, '--output', tmp_path / 'out')
    assert 'row 10 has no label' in said


def test_a_small_split_of_plain_labels_may_hold_each_once(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('string'))
    folder = write(tmp_path / 'data', features=features, labels=['a', 'b', 'c', 'd', 'e', 'f'])
    result = run_here('train.py', '--data-dir', folder, *FLAGS, '--output', tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_results(tmp_path / 'a')['images'] == dict(train=6, val=6, test=6)


@pytest.mark.parametrize('kind', ['binary', 'struct'])
def test_encoded_images_of_other_writers_are_found(tmp_path, kind):
    folder = tmp_path / 'data'
    folder.mkdir()
    for split, count in (('train', 12), ('test', 6)):
        images = [png(row) if kind == 'struct' else png(row)['bytes'] for row in range(count)]
        pq.write_table(pa.table(dict(image=images, label=[row % 2 for row in range(count)])),
                       folder / f'{split}-00000-of-00001.parquet')
    for number, path in enumerate((PATHS['memory'], PATHS['files'])):
        result = run_here('train.py', '--data-dir', folder, *FLAGS, *path, '--output', tmp_path, '--experiment',
                          str(number))
        assert result.returncode == 0, result.stderr
        assert read_results(tmp_path / str(number))['label_names'] == ['0', '1']


def test_policies_of_colours_are_not_for_grey_images(tmp_path):
    folder = write_classes(tmp_path / 'data', classes=2, train=8, test=4)
    said = refused('train.py', '--data-dir', folder, *FLAGS, *PATHS['files'], '--model-kwargs', 'in_chans=1', '--mean',
                   '0.5', '--std', '0.25', '--aa', 'rand-m9-mstd0.5', '--output', tmp_path / 'out')
    assert '--aa rand-m9-mstd0.5' in said


def test_batches_of_one_image_have_no_variance(tmp_path):
    folder = write_classes(tmp_path / 'data', classes=2, train=8, test=4)
    assert '--batch-size 1' in refused('train.py', '--data-dir', folder, *FLAGS, '-b', '1', '--output',
                                       tmp_path / 'out')


def test_a_stream_of_plain_labels_says_how_to(tmp_path):
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('string'))
    folder = write(tmp_path / 'data', features=features, labels=['a', 'b'])
    said = refused('train.py', '--data-dir', folder, *FLAGS, *PATHS['stream'], '--output', tmp_path / 'out')
    assert "column 'label' does not say which classes there are" in said
    assert 'leave out --streaming' in said


@pytest.mark.parametrize('path', PATHS)
def test_grey_networks_train_on_grey_pictures(tmp_path, path):
    folder = write_classes(tmp_path / 'data', classes=2, train=8, test=4)
    result = run_here('train.py', '--data-dir', folder, *FLAGS, *PATHS[path], '--output', tmp_path,
                      '--model-kwargs', 'in_chans=1', '--mean', '0.5', '--std', '0.25')
    assert result.returncode == 0, result.stderr
    again = run_here('validate.py', '--checkpoint', tmp_path / 'a' / 'model.safetensors', '--data-dir', folder)
    assert again.returncode == 0, again.stderr
    error = read_results(tmp_path / 'a')['test_best']['top1_err']
    assert f'"top1_err": {error}' in again.stdout


def test_pictures_have_one_or_three_channels(tmp_path):
    folder = write_classes(tmp_path / 'data', classes=2, train=4, test=4)
    said = refused('train.py', '--data-dir', folder, *FLAGS, '--model-kwargs', 'in_chans=4', '--output',
                   tmp_path / 'out')
    assert 'in_chans=4' in said


def test_a_last_batch_of_one_image_is_left_out(tmp_path):
    """Batch norm has no variance of one image; at 8 px the last stage of a ResNet-18 has one pixel."""
    folder = write_classes(tmp_path / 'data', classes=2, train=5, test=2)
    for number, flags in enumerate((['-b', '7'], ['-b', '4'])):  # 8 training images
        result = run_here('train.py', '--data-dir', folder, *FLAGS, '--model', 'sd_resnet18', *flags, '--output',
                          tmp_path, '--experiment', str(number))
        assert result.returncode == 0, result.stderr
        assert read_results(tmp_path / str(number))['images']['train'] == [7, 8][number]

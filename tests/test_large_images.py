"""The data path for large images: what an epoch sees, on any number of processes, from folders, parquet and streams."""
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import validate
from config import RankError, UserError, run
from data import open_split
from large_images import LoaderBatches, load_image_rows
from parts import hold_out
from test_train import assert_same_run, bench, command

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """An image folder of pictures of different sizes, brightness i of image i; one class is bright, one is dark."""
    root = tmp_path_factory.mktemp('pictures')
    for split, count in (('train', 22), ('validation', 6)):
        for i in range(count):
            place = root / split / ('dark' if i < count / 2 else 'light')
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40 + i, 50, 3), 10 * i, np.uint8)).save(place / f'{i:02d}.png')
    return str(root)


def batches(folder, split='train', size=4, train=True, augment=False, **kwargs):
    found = open_split(folder, split, streaming=(streaming := kwargs.pop('streaming', False)))
    rows = load_image_rows(found._replace(images=22 if split == 'train' else 6) if streaming else found)
    transform = create_transform((3, 8, 8), is_training=augment, mean=(0.,) * 3, std=(1.,) * 3, crop_pct=1.)
    return LoaderBatches(rows, size, transform, CPU, workers=2, train=train, **kwargs)


def brightness(loader):
    """The numbers of the images, batch by batch."""
    return [(x[:, 0, 0, 0] * 25.5).round().int().tolist() for x, _, _ in loader]


def test_an_epoch_sees_each_image_once_and_labels_go_with_them(folder):
    loader = batches(folder, 'validation', train=False)
    assert brightness(loader) == [[0, 1, 2, 3], [4, 5]]
    assert [label for _, target, _ in loader for label in target.tolist()] == [0, 0, 0, 1, 1, 1]
    seen = brightness(batches(folder))
    assert [len(batch) for batch in seen] == [4] * 5  # the last two of 22 images are left out, as by timm's loader
    assert len({image for batch in seen for image in batch}) == 20


@pytest.mark.parametrize('streaming', [False, True])
def test_order_and_augmentation_follow_from_seed_and_epoch(folder, streaming):
    def epoch(number, seed=0):
        loader = batches(folder, augment=True, streaming=streaming, seed=seed)
        loader.set_epoch(number)
        return torch.cat([x for x, _, _ in loader])

    torch.manual_seed(1)
    first = epoch(1)
    torch.manual_seed(2)  # whatever the process drew before
    assert torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(2))
    assert not torch.equal(first, epoch(1, seed=1))


def test_two_ranks_see_the_images_of_one(folder):
    alone = brightness(batches(folder))
    ranks = [brightness(batches(folder, size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]
    odd = [brightness(batches(folder, 'validation', size=5, train=False, rank=rank, world_size=4)) for rank in range(4)]
    assert sorted(image for rank in odd for batch in rank for image in batch) == list(range(6))


def test_a_stream_gives_all_ranks_as_many_full_batches(folder):
    for rank in range(2):
        assert [len(batch) for batch in brightness(batches(folder, size=3, streaming=True, rank=rank, world_size=2))] \
            == [3] * 3
    assert sorted(sum(brightness(batches(folder, 'validation', train=False, streaming=True)), [])) == list(range(6))


def test_a_stream_that_fills_no_batch_ends(folder):
    loader = batches(folder, size=20, streaming=True)
    loader.options['num_workers'] = 1
    assert len(brightness(loader)) == 1
    loader.batch_size = 23
    with pytest.raises(UserError, match='lower --batch-size'):
        list(loader)


def test_ranks_draw_augmentations_of_their_own(folder):
    first, second = (torch.cat([x for x, _, _ in batches(folder, augment=True, size=1, rank=rank, world_size=2)])
                     for rank in range(2))
    draws = [torch.initial_seed(), *(batches(folder, rank=rank, world_size=2)._draws().initial_seed()
                                     for rank in range(2))]
    assert len(set(draws)) == 3
    assert not torch.equal(first, second)


def test_holding_out_takes_the_images_apart(folder):
    train, val = hold_out(load_image_rows(open_split(folder, 'train')), 2)
    assert (len(train), len(val)) == (18, 4)
    assert val.labels.tolist() == val.split.rows['label'][:] == [0, 0, 1, 1]
    with pytest.raises(UserError, match='--val-split'):
        hold_out(load_image_rows(open_split(folder, 'train', streaming=True)._replace(images=22)), 2)


def test_a_damaged_image_is_named_in_one_line(folder, tmp_path):
    for label in ('dark', 'light'):
        place = tmp_path / 'train' / label
        place.mkdir(parents=True)
        Image.new('RGB', (9, 9)).save(place / 'good.png')
    (place / 'bad.png').write_bytes((place / 'good.png').read_bytes()[:40])
    with pytest.raises(RankError) as error:
        list(batches(str(tmp_path), size=1))
    assert 'bad.png is damaged' in str(error.value)
    assert '\n' not in str(error.value)


def test_every_rank_says_what_it_may_meet_alone(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    for kind, lines in ((RankError, 1), (UserError, 0)):
        def main(kind=kind):
            raise kind('bad.png is damaged')
        with pytest.raises(SystemExit, match='2'):
            run(main)
        assert capsys.readouterr().err.count('bad.png is damaged\n') == lines


def test_a_stream_of_unknown_length_is_refused(folder):
    with pytest.raises(UserError, match='leave out --streaming'):
        load_image_rows(open_split(folder, 'train', streaming=True)._replace(images=None))


def test_train_from_a_folder_and_resume_after_kill_9(folder, tmp_path):
    args = ['-c', 'imagenet', '--data-dir', folder, '--model', 'sd_resnet18', '--img-size', '32', '--epochs', '3',
            '-b', '4', '-j', '2', '--threads', '1', '--no-amp', '--output', str(tmp_path), '--experiment']
    undisturbed = bench('train.py', *args, 'a')
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert '"best_epoch": 2,' in undisturbed.stdout  # the validation images are the test's: the last epoch counts
    process = subprocess.Popen(command('train.py', *args, 'b'), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob('b/checkpoints/checkpoint-*.pt')):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / 'b' / 'results.json').exists()
    resumed = bench('train.py', *args, 'b', '--resume', 'auto')
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / 'a', tmp_path / 'b')
    found = bench('validate.py', '--checkpoint', tmp_path / 'a' / 'model.safetensors', '--data-dir', folder, '--split',
                  'validation', '--img-size', '32', '--no-in-memory')
    assert found.returncode == 0, found.stderr


def test_registered_weights_are_evaluated_at_their_test_size(folder, monkeypatch, capsys):
    """timm's validate.py does so: the figures on a model's page are those of this size."""
    model = timm.create_model('test_resnet', num_classes=2, pretrained_cfg_overlay=dict(test_input_size=(3, 48, 48)))
    sizes = set()
    model.register_forward_pre_hook(lambda module, args: sizes.add(args[0].shape[-1]))
    monkeypatch.setattr(validate, 'load_model', lambda args, num_classes: model)  # test_resnet's weights are on the Hub
    monkeypatch.setattr(sys, 'argv', ['validate.py', '--model', 'test_resnet', '--pretrained', '--data-dir', folder,
                                      '--split', 'validation', '--no-in-memory', '-j', '1'])
    validate.main()
    assert sizes == {48}
    assert '"img_size": 48' in capsys.readouterr().out

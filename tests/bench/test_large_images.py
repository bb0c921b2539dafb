"""The data path for large images: what an epoch sees, on any number of processes."""
import io
import json
import shutil
import sys
import traceback

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_transform

import validate
from harness.data.large_images import ImageRows, LoaderBatches, ReadImage
from harness.data.loaders import make_batches
from harness.data.settings import AugmentationSettings, ImageSettings
from harness.data.splits import hold_out
from harness.errors import RankError
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_results, run_here
from support.data import opened

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


def transform(augment=False, size=8):
    return create_transform((3, size, size), is_training=augment, use_prefetcher=True, crop_pct=1.)


def batches(folder, split='train', size=4, train=True, augment=False, workers=2, **kwargs):
    found = opened(folder, split)
    rows = ImageRows(found, torch.arange(len(found.labels)), found.labels)
    return LoaderBatches(rows, size, ReadImage(transform(augment), 'the folder'), (0.,) * 3, (1.,) * 3, CPU, workers,
                         train=train, **kwargs)


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


def test_order_and_augmentation_follow_from_seed_epoch_and_image(folder):
    """Whatever the process drew before, and whatever the numbers of workers and processes."""
    def epoch(number, seed=0, **kwargs):
        loader = batches(folder, augment=True, seed=seed, **kwargs)
        loader.set_epoch(number)
        return torch.cat([x for x, _, _ in loader])

    torch.manual_seed(1)
    first = epoch(1)
    torch.manual_seed(2)
    assert torch.equal(first, epoch(1))
    assert torch.equal(first, epoch(1, workers=3))
    state = torch.get_rng_state()
    assert torch.equal(first, epoch(1, workers=0))
    assert torch.equal(state, torch.get_rng_state())  # gates and dropout draw from it
    assert not torch.equal(first, epoch(2))
    assert not torch.equal(first, epoch(1, seed=1))
    halves = [epoch(1, size=2, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(first[0::2], halves[0])
    assert torch.equal(first[1::2], halves[1])


def test_each_image_of_each_epoch_is_augmented_in_its_own_way(folder):
    """Twenty readings of the same picture, by the seeds of an epoch and of the next."""
    loader = batches(folder, augment=True, workers=0)
    read, seen = ReadImage(transform(augment=True), 'the folder'), []
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    noise.save(buffer := io.BytesIO(), 'PNG')
    encoded = dict(bytes=buffer.getvalue(), path=None)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        list(loader)
        seen += [tuple(read(encoded, 0, seed).flatten().tolist()) for batch in loader.plan for _, seed in batch]
    assert len(seen) == len(set(seen)) == 40


def test_workers_live_from_epoch_to_epoch_and_draw_as_new_ones(folder):
    loader, seen = batches(folder, augment=True), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen.append(torch.cat([x for x, _, _ in loader]))
        seen.append({worker.pid for worker in loader.loader.loader._iterator._workers})
    assert seen[1] == seen[3]
    again = batches(folder, augment=True)
    again.set_epoch(1)
    assert torch.equal(seen[2], torch.cat([x for x, _, _ in again]))


def test_two_ranks_see_the_images_of_one(folder):
    alone = brightness(batches(folder))
    ranks = [brightness(batches(folder, size=2, rank=rank, world_size=2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]
    odd = [brightness(batches(folder, 'validation', size=5, train=False, rank=rank, world_size=4)) for rank in range(4)]
    assert sorted(image for rank in odd for batch in rank for image in batch) == list(range(6))


def test_holding_out_takes_the_images_apart(folder):
    found = opened(folder)
    train, val = hold_out(ImageRows(found, torch.arange(22), found.labels), 2)
    assert (len(train), len(val)) == (18, 4)
    assert val.labels.tolist() == found.labels[val.numbers].tolist() == [0, 0, 1, 1]
    assert sorted([*train.numbers.tolist(), *val.numbers.tolist()]) == list(range(22))


def test_a_damaged_image_is_named_in_one_line(folder, tmp_path):
    for label in ('dark', 'light'):
        place = tmp_path / 'train' / label
        place.mkdir(parents=True)
        Image.new('RGB', (9, 9)).save(place / 'good.png')
    (place / 'bad.png').write_bytes((place / 'good.png').read_bytes()[:40])
    with pytest.raises(RankError) as error:
        list(batches(str(tmp_path), size=1))
    # The traceback keeps the loader's workers alive; cleared, the test ends ten seconds earlier.
    traceback.clear_frames(error.value.__cause__.__traceback__)
    assert 'bad.png is damaged' in str(error.value)
    assert '\n' not in str(error.value)


def test_train_from_a_folder_and_resume(folder, tmp_path):
    args = ['-c', 'imagenet', '--data-dir', folder, '--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '2',
            '-b', '5', '-j', '2', '--threads', '1', '--no-amp', '--output', tmp_path, '--experiment']
    whole = run_here('train.py', *args, 'whole')
    assert whole.returncode == 0, whole.stderr
    results = read_results(tmp_path / 'whole')
    assert results['best_epoch'] == 1  # the validation images are the test's: the last epoch counts
    assert results['images'] == dict(train=20, val=6, test=6)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'again')
    (tmp_path / 'again' / 'results.json').unlink()
    RunFolder(tmp_path / 'again').remove_after(1)
    resumed = run_here('train.py', *args, 'again', '--resume', 'auto')
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / 'again', tmp_path / 'whole')
    found = run_here('validate.py', '--checkpoint', tmp_path / 'whole' / 'model.safetensors', '--data-dir', folder,
                     '--split', 'validation', '--img-size', '8', '--no-in-memory', '-j', '1')
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)['top1_err'] == results['test_best']['top1_err']


def ramp(tmp_path, **augmentation):
    """The only picture of a folder, 60 x 45 px and brighter from left to right, and what the network gets of it."""
    pixels = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None] * 4, (45, 60, 3)).copy()
    pixels[:, :, 1] = 5 * np.arange(45)[:, None]  # green: from top to bottom
    picture = Image.fromarray(pixels)
    for label in ('dark', 'light'):
        place = tmp_path / 'train' / label
        place.mkdir(parents=True)
        picture.save(place / 'picture.png')
    cfg = dict(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation='bicubic',
               crop_pct=0.8, crop_mode='center')
    found = opened(tmp_path)
    loader = make_batches(ImageRows(found, torch.arange(2), found.labels),
                          ImageSettings(batch_size=2, workers=1), cfg, Accelerator(cpu=True),
                          AugmentationSettings(**augmentation) if augmentation else None)
    return picture, next(iter(loader))[0][0], cfg


def test_evaluated_images_are_cropped_and_normalised_as_the_network_says(tmp_path):
    picture, x, cfg = ramp(tmp_path)
    small = picture.resize((26, 20), Image.Resampling.BICUBIC)  # the shorter side is 16 / 0.8
    pixels = np.asarray(small.crop((5, 2, 21, 18))).astype(np.float64) / 255
    expected = (pixels - np.array(cfg['mean'])) / np.array(cfg['std'])
    np.testing.assert_allclose(x.permute(1, 2, 0).double().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize('hflip', [0., 1.])
def test_trained_images_are_cropped_mirrored_and_jittered_as_the_flags_say(tmp_path, hflip):
    _, x, cfg = ramp(tmp_path, hflip=hflip, color_jitter=0., scale=[0.9, 1.])
    pixels = x * torch.tensor(cfg['std']).view(3, 1, 1) + torch.tensor(cfg['mean']).view(3, 1, 1)
    red, green = 255 * pixels[0].mean(0), 255 * pixels[1].mean(1)
    assert ((red[0] > red[-1]) if hflip else (red[0] < red[-1]))
    assert green[0] < green[-1]
    # nine tenths of the area, in proportions of 3:4 to 4:3, and the colours are the picture's
    assert min(red.max() - red.min(), green.max() - green.min()) > 0.6 * 220
    assert torch.allclose(255 * pixels[2], red.expand(16, 16), atol=2)


def test_registered_weights_are_evaluated_at_their_test_size(folder, monkeypatch, capsys):
    """timm's validate.py does so: the figures on a model's page are those of this size."""
    model = timm.create_model('test_resnet', num_classes=2, pretrained_cfg_overlay=dict(test_input_size=(3, 48, 48)))
    sizes = set()
    model.register_forward_pre_hook(lambda module, args: sizes.add(args[0].shape[-1]))
    monkeypatch.setattr(validate, 'load_network', lambda *args: model)  # test_resnet's weights are on the Hub
    monkeypatch.setattr(sys, 'argv', ['validate.py', '--model', 'test_resnet', '--pretrained', '--data-dir', folder,
                                      '--split', 'validation', '--no-in-memory', '-j', '1'])
    validate.main()
    assert sizes == {48}
    assert '"img_size": 48' in capsys.readouterr().out

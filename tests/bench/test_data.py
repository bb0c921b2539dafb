"""The fast data path: columns, splits, augmentation against loops, the same samples on any number of processes."""
import pytest
import torch
from accelerate import Accelerator

from harness.data.in_memory import ImageSet, MemoryBatches, load_image_set, random_crop_flip
from harness.data.settings import ImageSettings, SplitSettings
from harness.data.sources import SourceSettings
from harness.data.splits import hold_out, load_splits
from harness.errors import UserError
from support.data import image_set, opened, write_classes, write_parquet
from support.networks import CountOps


def test_decodes_losslessly_and_finds_columns(tmp_path):
    data = load_image_set(opened(write_parquet(tmp_path)))
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (6, 3, 8, 8)
    assert data.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.class_names == ['cat', 'dog']


def test_resizes_when_told(tmp_path):
    split = opened(write_parquet(tmp_path, odd_one=(5, 7)))
    assert load_image_set(split, 16).images.shape[2:] == (16, 16)


@pytest.mark.parametrize(('make', 'kwargs', 'split', 'words'), [
    (dict(labels=('fine', 'coarse')), {}, 'train', ['2 columns', 'fine', 'coarse', '--target-key']),
    ({}, dict(target_key='nothing'), 'train', ['--target-key', 'nothing', 'label']),
    ({}, dict(target_key='img'), 'train', ['--target-key', 'img', 'ClassLabel', 'label']),
    ({}, {}, 'validation', ['validation', 'train']),
    (dict(odd_one=(5, 7)), {}, 'train', ['image 5', '5x7', '--img-size']),
])
def test_bad_data_is_named(tmp_path, make, kwargs, split, words):
    folder = write_parquet(tmp_path, **make)
    with pytest.raises(UserError) as error:
        load_image_set(opened(folder, split, **kwargs))
    assert all(word in str(error.value) for word in words)
    assert '\n' not in str(error.value)


def test_two_label_columns_work_with_a_key(tmp_path):
    folder = write_parquet(tmp_path, labels=('fine', 'coarse'))
    assert len(opened(folder, target_key='fine').rows) == 6


def test_missing_folder():
    with pytest.raises(UserError, match='./nowhere'):
        opened('./nowhere')


def test_hold_out_is_stratified_and_always_the_same():
    data = image_set(20)
    train, val = hold_out(data, 3)
    assert torch.bincount(val.labels).tolist() == [3, 3]
    assert len(train) == 14
    together = torch.cat([train.images, val.images]).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, data.images.flatten(1).tolist()))
    torch.manual_seed(5)
    assert torch.equal(hold_out(data, 3)[1].images, val.images)
    with pytest.raises(UserError, match='--val-per-class 10'):
        hold_out(data, 10)


def test_what_is_held_out_comes_out_of_the_training_images(tmp_path):
    source = SourceSettings(write_classes(tmp_path, classes=3, train=6, extra=4, test=5))

    def pictures(images):
        return sorted(map(tuple, images.images.flatten(1).tolist()))

    def load(**kwargs):
        return load_splits(source, SplitSettings(**kwargs), ImageSettings(), Accelerator(cpu=True)).images

    plain = {split: load(train_split=split, val_split='test')['train'] for split in ('train', 'extra', 'test')}
    for kwargs, train, val in (
            (dict(val_per_class=[2]), [4], [2]),
            (dict(train_split='train+extra', val_per_class=[1, 3]), [5, 1], [1, 3])):
        loaded = load(**kwargs)
        assert torch.bincount(loaded['train'].labels).tolist() == [sum(train)] * 3
        assert torch.bincount(loaded['val'].labels).tolist() == [sum(val)] * 3
        joined = kwargs.get('train_split', 'train').split('+')
        assert sorted(pictures(loaded['train']) + pictures(loaded['val'])) == sorted(
            picture for split in joined for picture in pictures(plain[split]))
        held = pictures(loaded['val'])
        assert [len(set(held) & set(pictures(plain[split]))) for split in joined] == [3 * count for count in val]
        assert pictures(loaded['test']) == pictures(plain['test'])
    named = load(val_split='extra')
    assert [pictures(named[name]) for name in ('train', 'val', 'test')] == [
        pictures(plain[split]) for split in ('train', 'extra', 'test')]
    same = load(val_split='test')
    assert same['test'] is same['val']


def test_splits_of_other_sizes_are_refused(tmp_path):
    for split, size in (('train', 8), ('test', 6)):
        write_classes(tmp_path / split, classes=2, size=size, **{split: 4})
    train = tmp_path / 'train' / 'data' / 'train-00000-of-00001.parquet'
    train.replace(tmp_path / 'test' / 'data' / train.name)
    with pytest.raises(UserError, match=r'test images are \(6, 6\) px, those of training \(8, 8\)'):
        load_splits(SourceSettings(str(tmp_path / 'test')), SplitSettings(val_per_class=[1]), ImageSettings(),
                    Accelerator(cpu=True))


def test_crop_and_flip_equal_a_loop_over_samples():
    x = torch.randn(64, 3, 8, 8)
    draws = torch.rand(64, 3)
    out = random_crop_flip(x, 2, 0.5, draws)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for sample, image, (down, right, flip) in zip(out, x, draws.tolist(), strict=True):
        padded = torch.zeros(3, 12, 12)
        padded[:, 2:10, 2:10] = image
        top, left = int(down * 5), int(right * 5)
        expected = padded[:, top:top + 8, left:left + 8]
        assert torch.equal(sample, expected.flip(2) if flip < 0.5 else expected)


def test_shifts_are_uniform_and_half_are_flipped():
    n = 9000
    x = torch.zeros(n, 1, 8, 8)
    x[:, :, 4] = 1
    draws = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    rows = random_crop_flip(x, 4, 0., draws).amax(3).argmax(2).flatten()
    seen = torch.bincount(rows, minlength=8)  # one of the nine shifts moves the line out of sight: row 0
    assert ((seen / n - torch.tensor([2, 1, 1, 1, 1, 1, 1, 1]) / 9).abs() < 4 * (n / 9) ** 0.5 / n * 1.5).all()
    x = torch.zeros(n, 1, 8, 8)
    x[:, :, :, 0] = 1
    flipped = random_crop_flip(x, 0, 0.5, draws)[:, 0, :, 7].amax(1)
    assert abs(flipped.mean() - 0.5) < 4 * 0.5 / n ** 0.5


def test_normalised_to_the_given_mean_and_std():
    data = image_set()
    x, target, size = next(iter(MemoryBatches(data, 20, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))))
    expected = (data.images.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).double().view(3, 1, 1)) / \
        torch.tensor([0.2, 0.3, 0.4]).double().view(3, 1, 1)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(target, data.labels)
    assert size == 20


def test_every_image_once_an_epoch_in_an_order_of_seed_and_epoch():
    def epoch(number, seed=0):
        batches = MemoryBatches(image_set(20), 6, (0.,) * 3, (1.,) * 3, train=True, crop_padding=1, seed=seed)
        batches.set_epoch(number)
        assert len(batches) == 4
        return torch.cat([x for x, _, _ in batches])

    plain = MemoryBatches(image_set(20), 6, (0.,) * 3, (1.,) * 3, train=True)
    pixels = torch.cat([x for x, _, _ in plain]).mul(255).round().flatten(1)
    assert sorted(map(tuple, pixels.tolist())) == sorted(map(tuple, image_set(20).images.flatten(1).tolist()))
    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3), epoch(4))
    assert not torch.equal(epoch(3), epoch(3, seed=1))


def test_two_ranks_see_the_samples_of_one():
    def batches(rank, world_size):
        return list(MemoryBatches(image_set(19), 6 // world_size, (0.,) * 3, (1.,) * 3, train=True, crop_padding=2,
                                  hflip=0.5, rank=rank, world_size=world_size))

    for whole, first, second in zip(batches(0, 1), batches(0, 2), batches(1, 2), strict=True):
        assert torch.equal(whole[0][0::2], first[0])
        assert torch.equal(whole[0][1::2], second[0])
        assert whole[2] == first[2] == second[2] == len(first[1]) + len(second[1])


@pytest.mark.parametrize('ranks', [1, 2, 3])
@pytest.mark.parametrize(('train', 'drop_last'), [(True, False), (True, True), (False, False)])
def test_batches_made_at_once_are_those_made_one_by_one(train, drop_last, ranks):
    """Of 19 images, six in a batch of all ranks: the last and partial batch has nothing for a second or third rank."""
    data = image_set(19)
    for rank in range(ranks):
        batches = MemoryBatches(data, 6 // ranks, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), train, crop_padding=2, hflip=0.5,
                                rank=rank, world_size=ranks, drop_last=drop_last)
        batches.set_epoch(3)
        generator = batches.generator()
        order, draws = batches.order(generator), torch.rand(19, 3, generator=generator)
        expected = []
        for index, size in batches.shares(order):
            x = (data.images[index] - batches.mean) / batches.std
            expected.append((random_crop_flip(x, 2, 0.5, draws[index]) if train else x, data.labels[index], size))
        assert len(expected) == len(batches)
        for at_once in (1, 2, 3, 100):
            batches.at_once = at_once
            for (x, target, size), (x_alone, target_alone, size_alone) in zip(batches, expected, strict=True):
                assert torch.equal(x, x_alone)
                assert torch.equal(target, target_alone)
                assert size == size_alone
                assert x.is_contiguous(memory_format=torch.channels_last if train else torch.contiguous_format)


def test_a_gpu_makes_as_many_batches_at_once_as_fit_32_mib():
    """The device meta stands for it. 391 batches of 128 in groups of 21, and one of 4096 by itself is larger."""
    pictures = torch.empty(50_000, 3, 32, 32, dtype=torch.uint8, device='meta')
    data = ImageSet(pictures, torch.empty(50_000, dtype=torch.int64, device='meta'), [])
    for size, at_once, groups in ((128, 21, 19), (4096, 1, 13)):
        batches = MemoryBatches(data, size, (0.5,) * 3, (0.25,) * 3, train=True, crop_padding=4, hflip=0.5)
        assert batches.at_once == at_once
        with CountOps() as ops:
            assert [len(x) for x, _, _ in batches] == [size] * (len(batches) - 1) + [50_000 % size]
        assert ops.counts['constant_pad_nd'] == groups
    assert MemoryBatches(image_set(20), 1, (0.5,) * 3, (0.25,) * 3).at_once == 1

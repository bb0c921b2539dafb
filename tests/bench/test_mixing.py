"""mixup, CutMix and random erasing by the batch: what they mix, and that neither ranks nor a resume change it."""
import random

import numpy as np
import pytest
import torch

from harness.data.in_memory import MemoryBatches
from harness.data.mixing import BatchAugmentation
from harness.data.settings import AugmentationSettings
from support.data import image_set

CLASSES = 4


def mixed(settings, ranks=1, epoch=0, images=28, smoothing=0., seed=0, each=None):
    """The epoch's batches of 8 images of all ranks: images and targets in the order of the places.

    `each` is called with the batches of a rank before they are mixed.
    """
    whole = []
    for rank in range(ranks):
        batches = MemoryBatches(image_set(images, classes=CLASSES), 8 // ranks, (0.5,) * 3, (0.25,) * 3, train=True,
                                seed=seed, rank=rank, world_size=ranks, pairs=settings.mixes)
        batches.set_epoch(epoch)
        mix = BatchAugmentation(settings, batches, CLASSES, smoothing)
        for number, (x, target, size) in enumerate(batches):
            if rank == 0:
                targets = torch.zeros(size, CLASSES) if settings.mixes else torch.zeros(size, dtype=torch.int64)
                whole.append([torch.zeros(size, *x.shape[1:]), targets])
            if each is not None:
                each(x, target)
            x, target = mix(x.clone(), target, number, size)
            for tensor, found in zip(whole[number], (x, target), strict=True):
                tensor[batches.share(size)] = found
    return whole


def equal(ours, theirs):
    return all(torch.equal(*pair) for batch, other in zip(ours, theirs, strict=True)
               for pair in zip(batch, other, strict=True))


SETTINGS = {
    'mixup': AugmentationSettings(mixup=0.8), 'cutmix': AugmentationSettings(cutmix=1.),
    'both': AugmentationSettings(mixup=0.8, cutmix=1., mixup_prob=0.7),
    'pixel': AugmentationSettings(reprob=0.5), 'rand': AugmentationSettings(reprob=0.5, remode='rand', recount=3),
    'all': AugmentationSettings(mixup=0.8, cutmix=1., reprob=0.5, remode='const'),
}


@pytest.mark.parametrize('name', SETTINGS)
def test_any_number_of_ranks_mixes_and_erases_the_same(name):
    alone = mixed(SETTINGS[name])
    assert [len(x) for x, _ in alone] == [8, 8, 8, 4]
    assert equal(mixed(SETTINGS[name], ranks=2), alone)
    assert not equal(mixed(SETTINGS[name], epoch=1), alone)
    assert not equal(mixed(SETTINGS[name], seed=1), alone)


@pytest.mark.parametrize(('name', 'smoothing'), [('mixup', 0.), ('cutmix', 0.), ('both', 0.1)])
def test_images_and_targets_are_mixed_in_the_same_proportion(name, smoothing):
    """Against a loop over pixels: image i with the last but i, by one share a batch, which the target says."""
    plain = []
    shares, kinds = [], set()
    for epoch in range(20):
        plain.clear()
        batches = mixed(SETTINGS[name], epoch=epoch, smoothing=smoothing,
                        each=lambda x, target: plain.append((x.clone(), target)))
        for (x, target), (before, labels) in zip(batches, plain, strict=True):
            other, size = before.flip(0), x[0, 0].numel()
            one_hot = torch.nn.functional.one_hot(labels, CLASSES) * (1 - smoothing) + smoothing / CLASSES
            differs = (before != other).all(1)
            kept = ((x == before).all(1) & differs).sum().item() / differs.sum().item()
            is_cut = torch.logical_or(x == before, x == other).all().item()
            # the share of the image itself, from the pixels
            if is_cut:
                taken = (x == other).all(1).any(0) & ~(x == before).all(1).all(0)
                share = 1 - taken.sum().item() / size
                assert 0 <= kept <= 1
            else:
                share = ((x - other) / (before - other))[before != other].median().item()
                assert torch.allclose(x, share * before + (1 - share) * other, atol=1e-4)
            assert torch.allclose(target, share * one_hot + (1 - share) * one_hot.flip(0), atol=1e-4)
            shares.append(share)
            kinds.add('cut' if is_cut and share < 1 else 'mixed' if share < 1 else 'whole')
    assert {'mixup': {'mixed'}, 'cutmix': {'cut', 'whole'}, 'both': {'cut', 'mixed', 'whole'}}[name] >= kinds
    assert np.std(shares) > 0.1
    if name == 'both':  # 80 batches with a probability of 0.7, of which a few are cut by nothing
        assert 0.15 < sum(share == 1. for share in shares) / len(shares) < 0.5


def test_mixing_ends_after_an_epoch_and_targets_keep_their_shape():
    settings = AugmentationSettings(mixup=0.8, mixup_off_epoch=2)
    before = []
    for epoch in range(4):
        before.clear()
        batches = mixed(settings, epoch=epoch, each=lambda x, target: before.append((x.clone(), target)))
        same = [torch.equal(x, plain) for (x, _), (plain, _) in zip(batches, before, strict=True)]
        assert all(same) == (epoch >= 2)
        assert all(target.shape == (len(x), CLASSES) for x, target in batches)


def test_erasing_fills_rectangles_of_the_share_of_images_that_was_asked_for():
    settings = AugmentationSettings(reprob=0.25, remode='const')
    before, erased = [], []
    batches = mixed(settings, images=2000, each=lambda x, target: before.append(x.clone()))
    for (x, _), plain in zip(batches, before, strict=True):
        changed = x != plain
        assert (x[changed] == 0).all()
        erased += changed.any(1).flatten(1).any(1).tolist()
    assert 0.21 < sum(erased) / len(erased) < 0.29  # 4 standard deviations


def test_no_other_draw_is_disturbed():
    """Dropout, the tokens of gates and a user's own draws come from these generators."""
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    found = []
    for settings in (AugmentationSettings(), SETTINGS['all']):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        if settings.mixes:
            mixed(settings)
        found.append(draws())
    assert found[0] == found[1]


def test_pairs_of_an_odd_last_batch():
    batches = MemoryBatches(image_set(23), 4, (0.,) * 3, (1.,) * 3, train=True, world_size=2, pairs=True)
    assert batches.images == 22
    sizes = [[len(x) for x, _, _ in MemoryBatches(image_set(23), 4, (0.,) * 3, (1.,) * 3, train=True, rank=rank,
                                                  world_size=2, pairs=True)] for rank in range(2)]
    assert sizes == [[4, 4, 4], [4, 4, 2]]

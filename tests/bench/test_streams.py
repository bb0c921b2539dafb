"""Streams: each image once a pass, shuffled, and a resume that goes on where it was, on any number of readers."""
import random
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from harness.data import streams
from harness.data.columns import rename_classes
from harness.data.large_images import ReadImage
from harness.data.streams import StreamBatches
from harness.errors import UserError
from harness.training import Trainer
from support.commands import assert_same_run, read_results, refused, run_here
from support.data import opened, write_classes


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    """A folder of 60 pictures in files of 10, 20, 7, 11 and 12; the first pixel of picture n is n."""
    folder = tmp_path_factory.mktemp('shards')
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=['even', 'odd']))
    numbers = iter(range(60))
    for file, count in enumerate((10, 20, 7, 11, 12)):
        own = [next(numbers) for _ in range(count)]
        pictures = [Image.fromarray(np.full((4, 4, 3), number, np.uint8)) for number in own]
        rows = datasets.Dataset.from_dict(dict(image=pictures, label=[number % 2 for number in own]), features=features)
        rows.to_parquet(str(folder / f'train-{file:05d}-of-00005.parquet'))
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, 'BLOCK', 4)


def noisy(picture):
    """A transform that draws: the picture's number, and a number of each generator that timm's transforms use."""
    return torch.tensor([int(np.asarray(picture)[0, 0, 0]), random.randrange(256), torch.randint(256, ()).item()],
                        dtype=torch.uint8).view(3, 1, 1)


def stream(folder, images=24, size=4, workers=2, train=True, **kwargs):
    return StreamBatches(opened(folder, streaming=True), images, size, ReadImage(noisy, 'the stream'), (0.,) * 3,
                         (1 / 255,) * 3, torch.device('cpu'), workers, train=train, **kwargs)


def rows(batches):
    """(number, draw, draw) of each image, batch by batch."""
    return [[tuple(map(round, row)) for row in x.flatten(1).tolist()] for x, _, _ in batches]


def numbers(batches):
    return [number for batch in batches for number, _, _ in batch]


@pytest.mark.parametrize('workers', [0, 1, 3])
def test_a_pass_sees_each_image_once_in_another_order(shards, workers):
    """One reader after the other; with three, each of them reads its own files."""
    batches = stream(shards, images=60, size=1, workers=workers)
    passes = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        passes.append(numbers(rows(batches)))
    if workers < 2:
        assert sorted(passes[0]) == sorted(passes[1]) == list(range(60))
        assert passes[0] != passes[1]
    else:  # readers of fewer images begin their second pass earlier
        assert len(set(passes[0])) > 40
        assert set(passes[0] + passes[1]) == set(range(60))
    assert passes[0] != sorted(passes[0])
    again = numbers(rows(stream(shards, images=60, size=1, workers=workers)))
    assert again == passes[0]
    assert numbers(rows(stream(shards, images=60, size=1, workers=workers, seed=1))) != passes[0]


@pytest.mark.parametrize('workers', [2, 3, 4])
def test_each_image_counts_the_same_in_the_long_run(shards, workers):
    """Readers take as many images each, and with five files some have two and some one; in each pass other ones."""
    batches = stream(shards, images=60, size=1, workers=0, world_size=1)
    counts = np.zeros(60)
    for slot in range(workers):
        for image, _, _ in islice(batches.stream._rows(slot, workers, streams.Place()), 2 * 60):
            counts[int(image[0, 0, 0])] += 1
    assert set(counts) == {2 * workers}


def test_a_reader_holds_one_block_also_of_a_file_that_it_shares(shards, monkeypatch):
    """Of six readers of five files; each block is whole but the last."""
    sizes, blocks = [], streams.ImageStream._blocks

    def watched(self, *args):
        for block in blocks(self, *args):
            sizes.append(len(block))
            yield block
    monkeypatch.setattr(streams.ImageStream, '_blocks', watched)
    seen = [numbers(rows(stream(shards, None, train=False, workers=0, rank=rank, world_size=6))) for rank in range(6)]
    assert sorted(sum(seen, [])) == list(range(60))
    assert max(sizes) == 4
    assert sum(size < 4 for size in sizes) <= 10


def test_labels_go_with_their_images(shards):
    for x, target, size in stream(shards):
        assert (x[:, 0, 0, 0].round().long() % 2 == target).all()
        assert len(target) == size == 4


@pytest.mark.parametrize('workers', [0, 1, 2, 5])
@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_evaluation_sees_each_image_once(shards, workers, ranks):
    """Also with more readers than files, of which several then share one."""
    seen = [numbers(rows(stream(shards, None, train=False, workers=workers, rank=rank, world_size=ranks)))
            for rank in range(ranks)]
    assert sorted(sum(seen, [])) == list(range(60))
    if workers < 2 and ranks == 1:
        assert seen[0] == list(range(60))


def test_evaluation_again_sees_the_same(shards):
    batches = stream(shards, None, train=False, workers=1)
    assert numbers(rows(batches)) == numbers(rows(batches)) == list(range(60))


@pytest.mark.parametrize(('workers', 'ranks'), [(0, 1), (1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize('epochs', [1, 2, 3, 5])
def test_a_resumed_stream_goes_on_where_it_was(shards, workers, ranks, epochs):
    """No image is lost or repeated, augmentations are the same, and the readers take their turns as before."""
    for rank in range(ranks):
        kwargs = dict(images=28, size=4 // ranks, workers=workers, rank=rank, world_size=ranks)
        whole, undisturbed = stream(shards, **kwargs), []
        for epoch in range(epochs + 2):
            if epoch == epochs:
                state = whole.state_dict()
            undisturbed.append(rows(whole))
        resumed = stream(shards, **kwargs)
        resumed.load_state_dict(state)
        assert [rows(resumed), rows(resumed)] == undisturbed[epochs:]
        assert resumed.state_dict() == whole.state_dict()


def test_a_resumed_stream_opens_only_the_files_that_it_needs(shards, monkeypatch):
    batches = stream(shards, images=48, size=4, workers=0)
    before = numbers(rows(batches))
    opened_shards, blocks = [], streams.ImageStream._blocks
    monkeypatch.setattr(streams.ImageStream, '_blocks', lambda self, shard, part, parts, row: opened_shards.append(
        row) or blocks(self, shard, part, parts, row))
    resumed = stream(shards, images=12, size=4, workers=0)
    resumed.load_state_dict(batches.state_dict())
    after = numbers(rows(resumed))
    assert sorted(before + after) == list(range(60))
    assert opened_shards[0] == 16  # the file that was half read, from there
    assert len(opened_shards) == 3  # of five


def test_another_number_of_workers_is_refused(shards):
    batches = stream(shards, workers=2)
    with pytest.raises(UserError, match='read by 2 workers a process, and goes on with as many; --workers is 3'):
        stream(shards, workers=3).load_state_dict(batches.state_dict())


def test_readers_that_find_nothing_say_so(shards):
    batches = stream(shards, 400, workers=0, rank=99, world_size=100)
    with pytest.raises(UserError, match='too few images for 100 readers; lower --workers'):
        rows(batches)


def test_ranks_read_different_images(shards):
    first, second = (numbers(rows(stream(shards, images=24, size=2, workers=1, rank=rank, world_size=2)))
                     for rank in range(2))
    assert not set(first) & set(second)


def test_classes_of_another_order_are_counted_by_name(shards):
    split = rename_classes(opened(shards, streaming=True), ['odd', 'even', 'prime'], 'the network')
    batches = stream(shards, None, train=False, workers=0)
    batches.stream.split = split
    for x, target, _ in batches:
        assert (x[:, 0, 0, 0].round().long() % 2 == 1 - target).all()
    with pytest.raises(UserError, match="1 classes that the network does not know, such as 'odd'"):
        rename_classes(opened(shards, streaming=True), ['even'], 'the network')


def test_the_main_process_keeps_its_generators(shards):
    state, numpy_state, torch_state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    rows(stream(shards, workers=0))
    assert get_worker_info() is None
    assert random.getstate() == state
    assert np.random.get_state()[1].tolist() == numpy_state
    assert torch.equal(torch.get_rng_state(), torch_state)


# --- in trainings

FLAGS = ['--no-in-memory', '--streaming', '--val-split', 'test', '--model', 'sd_resnet20_cifar', '--img-size', '8',
         '-b', '4', '--threads', '1', '--no-amp', '-j', '2', '--color-jitter', '0.4']


@pytest.fixture
def data(tmp_path):
    """A folder that `datasets` has never counted."""
    return write_classes(tmp_path / 'data', classes=2, train=10, test=5)


def test_a_stream_of_unknown_length_needs_the_size_of_an_epoch(data, tmp_path):
    said = refused('train.py', '--data-dir', data, *FLAGS, '--output', tmp_path / 'out')
    assert 'tells of no number of images; say with --epoch-size' in said
    for size, words in (('3', 'at least a batch'), ('8', None)):
        if words:
            assert words in refused('train.py', '--data-dir', data, *FLAGS, '--epoch-size', size, '--output',
                                    tmp_path / 'out')
    said = refused('train.py', '--data-dir', data, '--epoch-size', '8', '--output', tmp_path / 'out')
    assert '--epoch-size 8 is for --streaming' in said
    assert not (tmp_path / 'out').exists()


def test_a_training_on_a_stream_resumes_exactly(data, tmp_path, monkeypatch):
    args = ['--data-dir', data, *FLAGS, '--epoch-size', '12', '--epochs', '4', '--output', tmp_path, '--experiment']
    whole = run_here('train.py', *args, 'whole')
    assert whole.returncode == 0, whole.stderr
    assert '12/?/? train/val/test' in whole.stderr
    results = read_results(tmp_path / 'whole')
    assert results['images'] == dict(train=12, val=10, test=10)
    save = Trainer.save

    class Stopped(BaseException):
        pass

    def stop(trainer, row):
        save(trainer, row)
        if trainer.progress.epoch == 2:
            raise Stopped
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, 'save', stop)
        with pytest.raises(Stopped):
            run_here('train.py', *args, 'again')
    resumed = run_here('train.py', *args, 'again', '--resume', 'auto')
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / 'again', tmp_path / 'whole')

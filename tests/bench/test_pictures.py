"""samples.png and mistakes.png: what is drawn, and that looking changes nothing."""
import time

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from harness import engine, training
from harness.data.in_memory import ImageSet, MemoryBatches
from harness.engine import autocast, evaluate
from harness.pictures import WORST, Mistake, Mistakes, save_mistakes, save_samples
from support.commands import assert_same_run, read_csv, run_here
from support.ranks import on_two_ranks

CLASSES, IMAGES = 7, 61


class Oracle(nn.Module):
    """Gives each image, whose first pixel is its number, the logits that are written down for it."""

    def __init__(self, logits, mean, std):
        super().__init__()
        self.logits, self.mean, self.std = logits, mean, std

    def forward(self, x):
        return self.logits[(x * self.std + self.mean)[:, 0, 0, 0].round().long()]


def evaluated(certainty):
    """A data set, the logits of its images (N, classes), and what an evaluation in batches of 8 finds of it."""
    generator, accelerator = torch.Generator().manual_seed(0), Accelerator(cpu=True)
    pictures = torch.randint(256, (IMAGES, 3, 4, 4), generator=generator, dtype=torch.uint8)
    pictures[:, 0, 0, 0] = torch.arange(IMAGES)
    data = ImageSet(pictures, torch.randint(CLASSES, (IMAGES,), generator=generator), list('abcdefg'))
    logits = certainty * torch.randn(IMAGES, CLASSES, generator=generator)
    batches = MemoryBatches(data, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), rank=accelerator.process_index,
                            world_size=accelerator.num_processes)
    mistakes = Mistakes(CLASSES, batches)
    evaluate(Oracle(logits, batches.mean, batches.std), batches, accelerator, autocast(accelerator.device, False),
             mistakes.add)
    return data, logits, mistakes.gather(accelerator)


def check_mistakes(certainty=3.):
    """Against a loop over the images."""
    data, logits, (confusion, worst) = evaluated(certainty)
    counts = [[0] * CLASSES for _ in range(CLASSES)]
    wrong = []
    for number, (label, of_image) in enumerate(zip(data.labels.tolist(), logits.double(), strict=True)):
        said = of_image.argmax().item()
        counts[label][said] += 1
        if said != label:
            others = of_image[[other for other in range(CLASSES) if other != said]]
            wrong.append(((of_image[said] - others.logsumexp(0)).item(), number, label, said))
    assert confusion.tolist() == counts
    wrong = sorted(wrong, reverse=True)[:WORST]
    assert len(worst) == WORST
    for mistake, (odds, number, label, said) in zip(worst, wrong, strict=True):
        assert (mistake.target, mistake.said) == (label, said)
        assert mistake.odds == pytest.approx(odds, rel=1e-5)
        assert mistake.picture.dtype == torch.uint8
        assert torch.equal(mistake.picture, data.images[number])  # what the file looked like


@pytest.mark.parametrize('certainty', [3., 300.])  # probabilities of 1 are told apart too
def test_mistakes_are_those_of_a_loop_over_the_images(certainty):
    check_mistakes(certainty)


def mistakes_of_two_ranks():
    assert Accelerator(cpu=True).num_processes == 2
    check_mistakes()


@pytest.mark.slow
def test_two_ranks_find_the_mistakes_of_one():
    on_two_ranks(mistakes_of_two_ranks)


def test_an_evaluation_without_mistakes_has_no_worst_ones():
    batches = MemoryBatches(ImageSet(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.arange(3), list('abc')), 2,
                            (0.5,) * 3, (0.2,) * 3)
    mistakes = Mistakes(3, batches)
    mistakes.add(torch.zeros(3, 3, 4, 4), torch.arange(3), torch.eye(3))
    mistakes.add(torch.zeros(0, 3, 4, 4), torch.arange(0), torch.zeros(0, 3))  # the share of a rank may be empty
    confusion, worst = mistakes.gather(Accelerator(cpu=True))
    assert confusion.tolist() == torch.eye(3).tolist()
    assert worst == []


def colors(path):
    with Image.open(path) as image:
        return len(image.convert('RGB').getcolors(2**24))


@pytest.mark.parametrize('shape', [(64, 3, 8, 8), (16, 3, 224, 224), (3, 3, 32, 32), (1, 1, 28, 28), (5, 4, 8, 6)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_samples_of_any_shape_are_drawn(tmp_path, shape, memory_format):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    names = ['cat', 'a class whose name is longer than its picture', '$x_{', 'dog']
    save_samples(x, torch.arange(len(x)) % 4, names, tmp_path / 'samples.png')
    assert colors(tmp_path / 'samples.png') > 50


def test_the_scale_of_samples_is_the_same_for_all_images(tmp_path):
    """A wrong mean makes all of them darker."""
    means = []
    for shift in (0., -1., -9.):
        save_samples(torch.full((16, 3, 8, 8), shift), torch.zeros(16, dtype=torch.long), ['a'], tmp_path / 'a.png')
        with Image.open(tmp_path / 'a.png') as image:
            means.append(image.convert('L').getpixel((image.width // 8, image.height // 8)))
    assert means == pytest.approx([255 * 0.5, 255 * 0.3, 0], abs=1)


@pytest.mark.parametrize('classes', [1, 2, 12, 13, 25, 26, 300])
@pytest.mark.parametrize('wrong', [0, 1, 12])
def test_mistakes_among_any_number_of_classes_are_drawn(tmp_path, classes, wrong):
    confusion = torch.eye(classes, dtype=torch.int64) * 9
    confusion[-1] = 0  # no image of this class
    worst = [Mistake(50. - 9 * number, 0, classes - 1, torch.randint(256, (3, 8, 8), dtype=torch.uint8))
             for number in range(wrong)]
    save_mistakes(confusion, worst, [f'$class {number} of many$' for number in range(classes)], tmp_path / 'a.png')
    assert colors(tmp_path / 'a.png') > 20


def test_a_run_draws_several_colors(finished):
    folder, _ = finished
    assert colors(folder / 'samples.png') > 50
    assert colors(folder / 'mistakes.png') > 50


@pytest.mark.parametrize('path', [(), ('--cuda-graphs',), ('--no-in-memory', '-j', '1')])
def test_the_batch_that_is_drawn_is_the_first_that_a_step_gets(toy_flags, tmp_path, monkeypatch, path):
    steps, drawn, make_step = [], [], training.make_step

    def watched(*args, **kwargs):
        step = make_step(*args, **kwargs)
        backward = step.backward
        step.backward = lambda x, target, *more: steps.append((x.clone(), target)) or backward(x, target, *more)
        return step

    monkeypatch.setattr(training, 'make_step', watched)
    monkeypatch.setattr(training, 'save_samples', lambda *args: drawn.append(args))
    result = run_here('train.py', *toy_flags, *path, '--epochs', '2', '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    (x, target, class_names, file), = drawn
    assert torch.equal(x, steps[0][0])
    assert torch.equal(target, steps[0][1])
    assert class_names == ['class 0', 'class 1', 'class 2', 'class 3']
    assert file == tmp_path / 'a' / 'samples.png'


def test_an_epoch_does_not_take_longer_for_its_drawing(toy_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'save_samples', lambda *args: time.sleep(3))
    result = run_here('train.py', *toy_flags, '--epochs', '1', '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert float(read_csv(tmp_path / 'a' / 'summary.csv')[0]['train_seconds']) < 3


def test_looking_changes_no_weight(toy_flags, tmp_path, monkeypatch, finished):
    monkeypatch.setattr(training, 'train_epoch', lambda *args, see_first_batch, **kwargs: engine.train_epoch(
        *args, **kwargs))
    result = run_here('train.py', *toy_flags, '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / 'a' / 'samples.png').exists()
    assert_same_run(tmp_path / 'a', finished[0])

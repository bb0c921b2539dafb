"""Images to look at: training images as the network sees them, and test images that it gets wrong."""
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from harness.data.batches import Batches
from harness.plots import plt, save_figure

SAMPLES = 16  # images in samples.png
WORST = 12  # images in mistakes.png
LIMIT = 2.5  # normalised values from -LIMIT, black, to LIMIT, white: fixed, so that a wrong mean or std is seen
CELL = 1.95  # width of an image, in inches: 224 pixels in the PNG, and a margin


def _short(name: str, length: int) -> str:
    """A class name of at most `length` characters."""
    return name if len(name) <= length else f'{name[:length - 1].rstrip()}…'


def _columns(images: int) -> int:
    """The columns of a grid that is as wide as high, or one column wider."""
    return math.ceil(math.sqrt(images))


def _show(axes: Axes, image: torch.Tensor, title: str) -> None:
    """Draws an image (C, H, W) of values in [0, 1]; where C isn't 3, its first channel in grey."""
    values = image.permute(1, 2, 0) if len(image) == 3 else image[0]
    axes.imshow(values.numpy(), cmap='gray', vmin=0, vmax=1)
    axes.set_title(title, fontsize=8, parse_math=False)
    axes.set_axis_off()


def _title(label: torch.Tensor, class_names: Sequence[str]) -> str:
    """The class of a label, (), or the two largest of a target, (classes,), of a mixed image."""
    if label.ndim == 0:
        return _short(class_names[int(label)], 24)
    (first, second), numbers = label.topk(2)
    if first - second > 0.75:  # hardly mixed, or smoothed
        return _short(class_names[int(numbers[0])], 24)
    return '\n'.join(f'{_short(class_names[int(number)], 18)} {100 * share:.0f} %'
                     for number, share in zip(numbers, (first, second), strict=True))


def save_samples(x: torch.Tensor, target: torch.Tensor, class_names: Sequence[str], path: Path) -> None:
    """Draws the first images of a batch as the network sees them.

    Args:
        x: Normalised images, (B, C, H, W).
        target: Their labels, (B,), or targets of mixed images, (B, classes).
        class_names: Of the data.
        path: The PNG to write.
    """
    means, stds = x.float().mean((0, 2, 3)).tolist(), x.float().std((0, 2, 3), correction=0).tolist()
    images, titles = x[:SAMPLES].float().cpu(), [_title(label, class_names) for label in target[:SAMPLES].cpu()]
    columns = _columns(len(images))
    rows, width = math.ceil(len(images) / columns), max(2, columns) * CELL
    colors = ('red', 'green', 'blue') if len(means) == 3 else [f'channel {number + 1}' for number in range(len(means))]
    statistics = ', '.join(f'{color} {mean:.2f} ± {std:.2f}'.replace(' ', '\N{NO-BREAK SPACE}')
                           for color, mean, std in zip(colors, means, stds, strict=True))
    caption = '\n'.join(textwrap.fill(line, int(14 * width)) for line in (
        f'First batch, as the network sees it. Black is {-LIMIT:g}, white is {LIMIT:g}.',
        f'Mean ± standard deviation over the batch of {len(x)}: {statistics}.'))
    height = rows * (CELL * x.shape[2] / x.shape[3] + 0.16) + 0.17 * (caption.count('\n') + 2)
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout='compressed', squeeze=False)
    for place in axes.flat:
        place.set_axis_off()
    for place, image, title in zip(axes.flat, images, titles, strict=False):
        _show(place, ((image + LIMIT) / (2 * LIMIT)).clamp(0, 1), title)
    figure.supxlabel(caption, fontsize=9)
    save_figure(figure, [], path)


class Mistake(NamedTuple):
    """An image that the network takes for one of another class.

    Attributes:
        odds: Log odds that the network gives its answer.
        target: The class of the image.
        said: The answer.
        picture: Its pixels before they were normalised, (C, H, W) uint8.
    """
    odds: float
    target: int
    said: int
    picture: torch.Tensor


class Mistakes:
    """What an evaluation takes for what, and the pictures of which it is most certain of the wrong class.

    Args:
        classes: How many.
        batches: What is evaluated. With their mean and std the network's input becomes pixels again.
    """

    def __init__(self, classes: int, batches: Batches) -> None:
        self.mean, self.std = batches.mean, batches.std
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=batches.mean.device)
        self.worst: list[torch.Tensor] = []  # log odds, label, answer and image of at most WORST images

    def add(self, x: torch.Tensor, target: torch.Tensor, logits: torch.Tensor) -> None:
        """Looks at images (B, C, H, W), labels (B,) and logits (B, classes), and never waits for the device."""
        top, said = logits.max(1)
        self.confusion.view(-1).scatter_add_(0, target * len(self.confusion) + said, torch.ones_like(target))
        # Log odds tell apart what as probabilities would all be 1.
        odds = top - logits.scatter(1, said[:, None], -math.inf).logsumexp(1)
        odds = odds.masked_fill(said == target, -math.inf)
        found = self._worst_of(odds, target, said, x)
        self.worst = self._worst_of(*map(torch.cat, zip(self.worst, found, strict=True))) if self.worst else found

    @staticmethod
    def _worst_of(odds: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        order = odds.topk(min(WORST, len(odds))).indices
        return [tensor[order] for tensor in (odds, *others)]

    def gather(self, accelerator: Accelerator) -> tuple[torch.Tensor, list[Mistake]]:
        """What all processes saw.

        Returns:
            The number of images by class and answer, (classes, classes), and the worst mistakes, the worst one first.
        """
        ours: list[Mistake] = []
        if self.worst:
            odds, target, said, x = self.worst
            pictures = (x * self.std + self.mean).round().clamp(0, 255).byte().cpu()
            ours = [Mistake(*of_image) for of_image
                    in zip(odds.tolist(), target.tolist(), said.tolist(), pictures, strict=True)]
        everyone: list[Any] = gather_object([mistake for mistake in ours if mistake.target != mistake.said])
        worst = sorted(everyone, key=lambda mistake: mistake.odds, reverse=True)[:WORST]
        return accelerator.reduce(self.confusion).cpu(), worst


def _show_confusion(axes: Axes, confusion: torch.Tensor, class_names: Sequence[str]) -> None:
    """Draws the number of images by class and answer, (classes, classes), in percent of each class."""
    classes = len(class_names)
    percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    # Few of the answers are wrong: their shades are drawn apart.
    image = axes.imshow(percent.numpy(), cmap='Blues', norm=PowerNorm(0.5, 0, 100), interpolation='nearest')
    axes.set(xlabel='said', ylabel='true')
    if classes <= 25:
        names = [_short(name, 16) for name in class_names]
        is_long = max(map(len, names)) * classes > 45
        axes.set_xticks(range(classes), names, fontsize=8, rotation=90 if is_long else 0, parse_math=False)
        axes.set_yticks(range(classes), names, fontsize=8, parse_math=False)
    else:
        axes.locator_params(integer=True)
    if classes <= 12:
        for row, counts in enumerate(confusion.tolist()):
            for column, count in enumerate(counts):
                share = percent[row, column].item()
                axes.text(column, row, f'{share:.0f}' if count else '', ha='center', va='center', fontsize=8,
                          color='white' if share > 40 else 'black')
    else:
        axes.figure.colorbar(image, ax=axes, label='percent of the true class', fraction=0.046, pad=0.02)


def save_mistakes(confusion: torch.Tensor, worst: Sequence[Mistake], class_names: Sequence[str], path: Path) -> None:
    """Draws what `Mistakes` has gathered.

    Args:
        confusion: The number of images by class and answer, (classes, classes).
        worst: The worst mistakes.
        class_names: Of the data.
        path: The PNG to write.
    """
    images, right = int(confusion.sum()), int(confusion.trace())
    figure = plt.figure(figsize=(13, 6.2), layout='constrained')
    halves: Any = figure.subfigures(1, 2, width_ratios=(5.6, 7.4))
    left, gallery = halves
    _show_confusion(left.subplots(), confusion, class_names)
    left.suptitle(f'{images - right} of {images} test images are wrong; each row in percent of its class', fontsize=10)
    if not worst:
        gallery.text(0.5, 0.5, 'no mistakes', ha='center', va='center', fontsize=14)
    else:
        columns = _columns(len(worst))
        places = gallery.subplots(math.ceil(len(worst) / columns), columns, squeeze=False)
        for place in places.flat:
            place.set_axis_off()
        for place, mistake in zip(places.flat, worst, strict=False):
            said = f'{_short(class_names[mistake.said], 15)} ({100 / (1 + math.exp(-mistake.odds)):.0f} %)'
            _show(place, mistake.picture / 255, f'true: {_short(class_names[mistake.target], 22)}\nsaid: {said}')
        gallery.suptitle('Where the network was most certain of a wrong class', fontsize=10)
    save_figure(figure, [], path)

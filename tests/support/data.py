"""Small data sets in memory and in files."""
import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from harness.data.columns import open_split
from harness.data.in_memory import ImageSet
from harness.data.sources import SourceSettings, open_data


def image_set(n=20, size=8, classes=2):
    """Random pictures, with labels in turn."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return ImageSet(pictures, torch.arange(n) % classes, [str(label) for label in range(classes)])


def opened(folder, split='train', **source):
    """One split of a data set, open."""
    source = SourceSettings(str(folder), **source)
    return open_split(open_data(source, Accelerator(cpu=True)), source, split)


def write_parquet(folder, n=6, size=8, labels=('label',), odd_one=None):
    """A training split of pictures of two classes, brightness 10 i of picture i; returns the folder's name."""
    pictures = [Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8)) for i in range(n)]
    if odd_one is not None:
        pictures[-1] = pictures[-1].resize(odd_one)
    columns = dict(img=pictures, **{label: [i % 2 for i in range(n)] for label in labels})
    kinds = {label: datasets.ClassLabel(names=['cat', 'dog']) for label in labels}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(img=datasets.Image(), **kinds))
    (folder / 'data').mkdir(parents=True, exist_ok=True)
    data.to_parquet(folder / 'data' / 'train-00000-of-00001.parquet')
    return str(folder)


def write_classes(folder, classes=4, size=8, **splits):
    """Splits of noisy pictures whose brightness tells their class.

    Args:
        folder: Where to.
        classes: How many.
        size: Side in pixels.
        **splits: Pictures of each class, by split.

    Returns:
        The folder's name.
    """
    noise = np.random.default_rng(0)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[f'class {label}' for label in range(classes)]))
    (folder / 'data').mkdir(parents=True)
    for split, count in splits.items():
        labels = list(range(classes)) * count
        pictures = [Image.fromarray((200 / classes * label + noise.integers(0, 55, (size, size, 3))).astype(np.uint8))
                    for label in labels]
        data = datasets.Dataset.from_dict(dict(image=pictures, label=labels), features=features)
        data.to_parquet(folder / 'data' / f'{split}-00000-of-00001.parquet')
    return str(folder)

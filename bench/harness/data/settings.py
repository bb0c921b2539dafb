"""The flags that say which images are trained and tested on, and how they are looked at."""
from dataclasses import dataclass

from harness.cli import finite, flag, non_negative, non_negative_int, positive_int, unit_interval


@dataclass(frozen=True)
class ImageSettings:
    """Images and batches."""
    num_classes: int | None = flag(None, 'checked against the data', type=int)
    img_size: int | None = flag(None, 'side in pixels; images of another size are resized', type=positive_int)
    mean: list[float] | None = flag(None, "mean of each channel (default: the model's)", type=finite, nargs='+')
    std: list[float] | None = flag(None, "standard deviation of each channel (default: the model's)", type=finite,
                                   nargs='+')
    batch_size: int = flag(128, 'images a process and step', short='-b', type=positive_int)
    in_memory: bool = flag(True, 'decode all images once into memory, for small ones; otherwise --workers read them')
    workers: int = flag(4, 'processes that read where not --in-memory', short='-j', type=non_negative_int)


@dataclass(frozen=True)
class SplitSettings:
    """Training, validation and test images."""
    train_split: str = flag('train', "'+' joins several")
    val_split: str | None = flag(None, "split to select by (default: held out of the training split); 'auto': the "
                                       'validation split if there is one')
    test_split: str = flag('test', "looked at once, at the end; 'auto': the test split if there is one, otherwise the "
                                   'validation images, and then the last epoch counts')
    validation_batch_size: int | None = flag(None, 'images a process and step in validation and testing (default: '
                                                   '--batch-size)', short='-vb', type=positive_int)
    val_per_class: list[int] = flag([500], 'images of each class held out for validation, one number for each joined '
                                    'split', type=positive_int, nargs='+')
    val_fraction: float | None = flag(None, 'share of each class held out instead', type=unit_interval)
    epoch_size: int | None = flag(None, 'images an epoch, where --streaming does not tell how many there are',
                                  type=positive_int)


@dataclass(frozen=True)
class AugmentationSettings:
    """Augmentation."""
    crop_padding: int = flag(4, 'in memory: zeros around, then a crop', type=non_negative_int)
    hflip: float = flag(0.5, 'probability of a horizontal flip', type=unit_interval)
    scale: list[float] = flag([0.08, 1.], 'not in memory: area of a crop', type=unit_interval, nargs=2)
    color_jitter: float = flag(0.4, 'not in memory: strength', type=non_negative)
    aa: str | None = flag(None, "not in memory: timm's auto-augment policy, such as rand-m9-mstd0.5")

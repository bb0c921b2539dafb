"""The flags that say which images are trained and tested on, and how they are looked at."""
from dataclasses import dataclass

from harness.cli import finite, flag, non_negative, non_negative_int, positive, positive_int, unit_interval


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
    workers: int = flag(4, 'processes that read', short='-j', type=non_negative_int, needs='no_in_memory')


@dataclass(frozen=True)
class HeldOutSettings:
    """Training and validation images."""
    train_split: str = flag('train', "'+' joins several")
    val_split: str | None = flag(None, "split to select by (default: held out of the training split); 'auto': the "
                                       'validation split if there is one')
    val_per_class: list[int] = flag([500], 'images of each class held out for validation, one number for each joined '
                                    'split', type=positive_int, nargs='+')
    val_fraction: float | None = flag(None, 'share of each class held out instead', type=unit_interval)


@dataclass(frozen=True)
class SplitSettings(HeldOutSettings):
    """Training, validation and test images."""
    test_split: str = flag('test', "looked at once, at the end; 'auto': the test split if there is one, otherwise the "
                                   'validation images, and then the last epoch counts')
    validation_batch_size: int | None = flag(None, 'images a process and step in validation and testing (default: '
                                                   '--batch-size)', short='-vb', type=positive_int)
    epoch_size: int | None = flag(None, 'images an epoch, where --streaming does not tell how many there are',
                                  type=positive_int)


@dataclass(frozen=True)
class AugmentationSettings:
    """Augmentation."""
    aug: bool = flag(True, 'augment training images')
    crop_padding: int = flag(4, 'zeros around, then a crop', type=non_negative_int, needs='in_memory aug')
    hflip: float = flag(0.5, 'probability of a horizontal flip', type=unit_interval, needs='aug')
    vflip: float = flag(0., 'probability of a vertical flip', type=unit_interval, needs='aug')
    scale: list[float] = flag([0.08, 1.], 'area of a crop', type=unit_interval, nargs=2, needs='no_in_memory aug')
    ratio: list[float] = flag([3 / 4, 4 / 3], 'width to height of a crop', type=positive, nargs=2,
                              needs='no_in_memory aug')
    color_jitter: float = flag(0.4, 'strength', type=non_negative, needs='no_in_memory aug')
    aa: str | None = flag(None, "timm's auto-augment policy, such as rand-m9-mstd0.5", needs='no_in_memory aug')
    train_interpolation: str | None = flag(
        None, "of training images (default: the model's)", choices=('random', 'bilinear', 'bicubic'),
        needs='no_in_memory aug')
    reprob: float = flag(0., 'probability of erasing a rectangle', type=unit_interval, needs='aug')
    remode: str = flag('pixel', 'what it is filled with: noise of each pixel, one random color, or the mean',
                       choices=('pixel', 'rand', 'const'), needs='reprob')
    recount: int = flag(1, 'rectangles of an image, at most', type=positive_int, needs='reprob')
    mixup: float = flag(0., 'alpha of mixup, which blends two images', type=non_negative)
    cutmix: float = flag(0., 'alpha of CutMix, which pastes a rectangle of another image', type=non_negative)
    mixup_prob: float = flag(1., 'probability that a batch is mixed', type=unit_interval, needs='mixup|cutmix')
    mixup_switch_prob: float = flag(0.5, 'probability of CutMix where both are on', type=unit_interval,
                                    needs='mixup cutmix')
    mixup_off_epoch: int = flag(0, 'epochs after which nothing is mixed any more (0: never)', type=non_negative_int,
                                needs='mixup|cutmix')

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, for which timm needs an even number of them."""
        return self.mixup > 0 or self.cutmix > 0

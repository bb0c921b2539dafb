"""Error and speed of a network that loses residual blocks after training."""
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

import timm_sd
from harness.cli import flag, non_negative_int, number, positive_int, unit_interval, unmet
from harness.data.batches import Batches
from harness.data.settings import HeldOutSettings, ImageSettings, SplitSettings
from harness.data.sources import SourceSettings
from harness.data.splits import Images, LoadedData, load_splits
from harness.errors import UserError, user_errors
from harness.run_folder import read_metadata
from timing.inference import inference_rates
from timm_sd.compute import multiplications
from timm_sd.probe import residual_blocks


@dataclass(frozen=True)
class DepthsSettings:
    """Depth after training."""
    blocks: list[int] | None = flag(None, 'residual blocks that stay, a network for each number', nargs='+',
                                    type=non_negative_int)
    share: list[float] | None = flag(None, 'or shares of the multiplications that stay', nargs='+', type=unit_interval)
    order: str = flag('end', 'which blocks go first: those at the end of each stage, or those without which the loss '
                      'on the validation images is lowest', choices=('end', 'measured'), needs='blocks|share')
    bn_images: int | None = flag(None, 'training images by which statistics of batch norm are estimated anew (default: '
                                 'they stay)', type=positive_int, needs='blocks|share')
    rounds: int = flag(20, 'batches timed of each network, in turns', type=number(int, 2), needs='blocks|share')

    @property
    def depths(self) -> list[dict[str, Any]]:
        """What `timm_sd.shorten` is told of each depth."""
        return [*(dict(blocks=blocks) for blocks in self.blocks or ()),
                *(dict(share=share) for share in self.share or ())]


def check_depths(flags: dict[str, Any]) -> None:
    """Raises UserError unless these flags of validate.py go together."""
    for key, needed in unmet(flags, DepthsSettings).items():
        if flags[key] != getattr(DepthsSettings(), key):
            raise UserError(f'--{key.replace("_", "-")} does nothing without {needed}; leave it out')
    if flags['order'] != 'measured' and not flags['bn_images']:
        for key, default in vars(HeldOutSettings()).items():
            if flags[key] != default:
                raise UserError(f'--{key.replace("_", "-")} does nothing without --order measured or --bn-images; '
                                'leave it out')
    if flags['blocks'] and flags['share']:
        raise UserError('--blocks and --share say the same in two ways; give one')
    if len(flags['checkpoint'] or ()) > 1 and not (flags['blocks'] or flags['share']):
        raise UserError('several --checkpoint are compared by --blocks or --share; give one of these')


def load_training_images(source: SourceSettings, held_out: HeldOutSettings, split: str, images: ImageSettings,
                         accelerator: Accelerator, channels: int, names: list[str] | None,
                         checkpoints: Sequence[str]) -> LoadedData:
    """The training and validation images that networks were trained with.

    Args:
        source: The data set.
        held_out: Which of its training images are for validation.
        split: What is evaluated.
        images: How they are looked at.
        accelerator: One of its processes looks for the files.
        channels: 3, or 1 for grey.
        names: Of the networks' classes, if they are known.
        checkpoints: Files of the networks' weights.

    Raises:
        UserError: If their classes are counted otherwise, other images were held out in training, or the validation
            images are those that are evaluated.
    """
    splits = SplitSettings(**vars(held_out), test_split=split)
    data = load_splits(source, splits, images, accelerator, channels, sys.stderr.isatty())
    if names is not None and data.class_names != names:
        raise UserError('the data counts its classes otherwise than the network, which --order measured and '
                        '--bn-images can not follow')
    if not data.selects:
        raise UserError(f'the validation images are those of --split {split}, and what was chosen by them can not be '
                        'judged by them; give another --val-split')
    for file in checkpoints:
        theirs = read_metadata(file).get('held_out', data.record['held_out'])
        if theirs != data.record['held_out']:
            raise UserError(f'{file} was trained with {theirs} held out, and not {data.record["held_out"]}; give its '
                            '--val-split, --val-per-class or --val-fraction')
    return data


def some_of(images: Any, count: int) -> Images:
    """So many images of a split at random, always the same ones; UserError if it has fewer."""
    if count > len(images):
        raise UserError(f'--bn-images is {count}, and there are {len(images)} training images; give as many or fewer')
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]


class Pairs:
    """Images (B, C, H, W) and labels (B,) of batches, as often as they are asked for."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((x, target) for x, target, _ in self.batches)


def measure_depths(networks: dict[str, Any], settings: DepthsSettings, evaluate: Callable[[Any], dict[str, Any]],
                   held_out: Pairs | None, bn_batches: Pairs | None, size: tuple[int, ...],
                   amp: bool) -> list[dict[str, Any]]:
    """Shortens networks to several depths each, evaluates them, and times them in turns.

    Args:
        networks: Trained networks by what they are called.
        settings: The depths.
        evaluate: Gives the columns of a row.
        held_out: What a measured order is measured on.
        bn_batches: What batch norm is estimated anew by; None leaves it.
        size: Of the batches that are timed, (B, C, H, W).
        amp: Time in bf16 autocast.

    Returns:
        A row for each network and depth: how many `blocks` stay, and which `share` of the multiplications.

    Raises:
        UserError: If a network can't be shortened like that.
    """
    rows, shortened = [], []
    example = torch.zeros(1, *size[1:])
    for name, network in networks.items():
        with user_errors(name):
            order = None if held_out is None else timm_sd.rank_blocks(network, held_out, example_input=example)
            total = len(residual_blocks(network, example_input=example).closable)
            full = multiplications(network, example)
            for depth in settings.depths:
                short = timm_sd.shorten(copy.deepcopy(network), order=order, bn_batches=bn_batches,
                                        example_input=example, **depth)
                gone = timm_sd.removed_blocks(short)
                rows.append(dict(network=name, blocks=total - len(gone),
                                 share=round(multiplications(short, example) / full, 4), removed=gone,
                                 **evaluate(short)))
                shortened.append(short)
    rates = inference_rates(shortened, [size] * len(shortened), amp, settings.rounds)
    return [dict(row, images_per_second=rate) for row, rate in zip(rows, rates, strict=True)]


def print_depths(rows: list[dict[str, Any]]) -> None:
    """One line a row, to stderr."""
    width = max(len(row['network']) for row in rows)
    print(f'{"":{width}}  blocks  multiplications  top-1 error  images/s', file=sys.stderr)
    for row in rows:
        print(f'{row["network"]:{width}}{row["blocks"]:8}{row["share"]:17.0%}{row["top1_err"]:13.2f}'
              f'{row["images_per_second"]["median"]:10.0f}', file=sys.stderr)

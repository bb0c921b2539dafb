"""What a network is worth that loses residual blocks after training, and how fast it is then."""
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import timm_sd
from harness.cli import flag, non_negative_int, positive_int, unit_interval
from harness.data.batches import Batches
from harness.errors import user_errors
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
    rounds: int = flag(20, 'batches timed of each network, in turns', type=positive_int, needs='blocks|share')

    @property
    def depths(self) -> list[dict[str, Any]]:
        """What `timm_sd.shorten` is told of each depth."""
        return [*(dict(blocks=number) for number in self.blocks or ()),
                *(dict(share=share) for share in self.share or ())]


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
                                 share=round(multiplications(short, example) / full, 4), removed=list(gone),
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

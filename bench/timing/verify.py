"""Whether the recorded step computes what the eager one does, on the device at hand.

An eager training is compared with itself, run again, and with a recorded one: a difference that the first comparison
has too comes from the kernels, not from the recording.
"""
import copy
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from timing.contestants import Variant, build, make_step

STEPS = 12
PARTIAL = 6  # every so many steps the batch is a partial one
# bf16 autocast or not, and whether cuDNN may only take kernels that repeat themselves
SETTINGS = ((False, True), (True, True), (True, False))


def first_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str | None:
    """The first tensor that isn't equal bit for bit."""
    return next((name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])), None)


def verify(model: str, variant: Variant, batch_size: int) -> list[dict[str, Any]]:
    """Trains three copies of a network for a few steps; a row for each comparison.

    Args:
        model: Name of a network sd_resnet*_cifar.
        variant: Of mode 'batch', or constant depth.
        batch_size: Of the full batches; every sixth has a third less.
    """
    torch.manual_seed(0)
    accelerator = Accelerator()
    network = build(model, variant).to(accelerator.device).to(memory_format=torch.channels_last).train()
    size = network.pretrained_cfg['input_size']
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    rows = []
    alive = []  # a recording that is freed while another one is made would break it
    for amp, deterministic in tqdm(SETTINGS, desc=f'{model}, {variant.label}', leave=False):
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
        trainings = {name: make_step(copy.deepcopy(network), accelerator, amp, name == 'recorded')
                     for name in ('eager', 'eager again', 'recorded')}
        alive.append(trainings)
        found = {name: dict[str, Any](first_step=None, first_tensor=None) for name in trainings if name != 'eager'}
        for number in range(STEPS):
            images = batch_size - batch_size // 3 * (number % PARTIAL == PARTIAL - 1)
            x = torch.randn(images, *size, device=accelerator.device).to(memory_format=torch.channels_last)
            target = torch.randint(network.num_classes, (images,), device=accelerator.device)
            states: dict[str, dict[str, torch.Tensor]] = {}
            for name, step in trainings.items():
                loss = step.backward(x, target, images, is_update=True).clone()
                step.update()
                states[name] = dict(step.model.state_dict(), loss=loss)
            for name, first in found.items():
                tensor = first_difference(states['eager'], states[name])
                if first['first_step'] is None and tensor is not None:
                    first.update(first_step=number + 1, first_tensor=tensor)
        for name, first in found.items():
            gaps = [(ours.double() - theirs.double()).abs().max().item() for ours, theirs in zip(
                states['eager'].values(), states[name].values(), strict=True)]
            rows.append(dict(model=model, name=variant.label, amp=amp, deterministic=deterministic, compared=name,
                             steps=STEPS, **first, largest_difference=max(gaps)))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    return rows


def describe(row: dict[str, Any]) -> str:
    """A row as a line."""
    kernels = 'deterministic' if row['deterministic'] else 'benchmarked'
    if row['first_step'] is None:
        said = f'equal in all {row["steps"]} steps'
    else:
        said = (f'first differs in step {row["first_step"]}, in {row["first_tensor"]}; in the end by '
                f'{row["largest_difference"]:.3g} at most')
    return (f'{row["model"]:20}{row["name"]:20}{"bf16" if row["amp"] else "fp32":6}{kernels:15}{row["compared"]:13}'
            f'{said}')


def is_right(rows: list[dict[str, Any]]) -> bool:
    """Whether each recorded training equals the eager one wherever that equals itself."""
    return all(again['first_step'] is not None or recorded['first_step'] is None
               for again, recorded in zip(rows[::2], rows[1::2], strict=True))

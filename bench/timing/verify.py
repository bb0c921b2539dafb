"""Whether the recorded step computes what the eager one does, on the device at hand.

An eager training is compared with itself, run again, and with a recorded one: a difference that the first comparison
has too comes from the kernels, not from the recording.
"""
import copy
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

import timm_sd
from harness.engine import TrainStep
from harness.graphs import make_step
from timing.contestants import Variant, build, papers_optimizer

STEPS = 12
PARTIAL = 6  # every so many steps the batch is a partial one
EVALUATED, CHANGED = 4, 8  # behind these steps the networks are evaluated, and their rates are halved
# bf16 autocast or not, and whether cuDNN may only take kernels that repeat themselves
SETTINGS = ((False, True), (True, True), (True, False))


def first_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str | None:
    """The first tensor that isn't equal bit for bit."""
    return next((name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])), None)


def verify(model: str, variant: Variant, batch_size: int) -> list[dict[str, Any]]:
    """Trains three copies of a network for a few steps, two to an update; a row for each comparison.

    Args:
        model: Name of a network sd_resnet*_cifar.
        variant: Of mode 'batch', or constant depth.
        batch_size: Of the full batches; every sixth has a third less.
    """
    torch.manual_seed(0)
    accelerator = Accelerator()
    device = accelerator.device
    network = build(model, variant).to(device).to(memory_format=torch.channels_last).train()
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    rows = []
    for amp, deterministic in tqdm(SETTINGS, desc=f'{model}, {variant.label}', leave=False):
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
        trainings = {}
        for name in ('eager', 'eager again', 'recorded'):
            twin = copy.deepcopy(network)
            trainings[name] = make_step(twin, papers_optimizer(twin), accelerator, amp, name == 'recorded')
        found = {name: dict[str, Any](first_step=None, first_tensor=None) for name in trainings if name != 'eager'}
        for number in range(1, STEPS + 1):
            images = batch_size - (batch_size // 3 if number % PARTIAL == 0 else 0)
            x = torch.randn(images, *network.pretrained_cfg['input_size'], device=device)
            x, target = x.to(memory_format=torch.channels_last), torch.randint(10, (images,), device=device)
            states = {name: one_step(step, x, target, number) for name, step in trainings.items()}
            for name, first in found.items():
                tensor = first_difference(states['eager'], states[name])
                if first['first_step'] is None and tensor is not None:
                    first.update(first_step=number, first_tensor=tensor)
        for name, first in found.items():
            gaps = [(ours.double() - theirs.double()).abs().max().item() for ours, theirs in zip(
                states['eager'].values(), states[name].values(), strict=True)]
            rows.append(dict(model=model, name=variant.label, scale=variant.scale, amp=amp,
                             deterministic=deterministic, compared=name, steps=STEPS, **first,
                             largest_difference=max(gaps)))
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    return rows


def one_step(step: TrainStep, x: torch.Tensor, target: torch.Tensor, number: int) -> dict[str, torch.Tensor]:
    """Takes one step, the `number`-th; returns the state of the network, and the loss."""
    loss = step.backward(x, target, 2 * len(x), is_update=number % 2 == 0).clone()
    if number % 2 == 0:
        step.update()
    if number == EVALUATED:
        with torch.no_grad():
            step.model.eval()(x)
        step.model.train()
    gates: Any = timm_sd.depth_gates(step.model)
    if number == CHANGED:
        gates.set_drop_path_rate(gates.drop_path_rates[-1] / 2)
    return dict(step.model.state_dict(), loss=loss)


def describe(row: dict[str, Any]) -> str:
    """A row as a line."""
    kernels = 'deterministic' if row['deterministic'] else 'benchmarked'
    if row['first_step'] is None:
        said = f'equal in all {row["steps"]} steps'
    else:
        said = (f'first differs in step {row["first_step"]}, in {row["first_tensor"]}; in the end by '
                f'{row["largest_difference"]:.3g} at most')
    name = row['name'] + (f', scale {row["scale"]}' if row['name'] != 'constant' else '')
    return (f'{row["model"]:20}{name:28}{"bf16" if row["amp"] else "fp32":6}{kernels:15}{row["compared"]:13}'
            f'{said}')


def is_right(rows: list[dict[str, Any]]) -> bool:
    """Whether no recorded training differs by much more than the eager one does from itself, which may be nothing."""
    return all(recorded['largest_difference'] <= 10 * again['largest_difference']
               for again, recorded in zip(rows[::2], rows[1::2], strict=True))

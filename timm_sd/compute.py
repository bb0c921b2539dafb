"""How a network's multiplications are shared out among its residual branches, and how many a training step runs."""
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .block_probe import training_mode
from .gates import DepthGates
from .probe import example_arguments
from .skippable import SkippableBlock


def _count(model: nn.Module, example_input: Any) -> dict[str, int]:
    """The multiplications and additions of each of a network's modules, by name, and of all of it as 'Global'."""
    args, kwargs = example_arguments(model, example_input)
    # With gradients, for the counter asks tensors for theirs; attention written out, for it knows no kernel of a CPU's.
    with training_mode(model, False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), \
            FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return {name: sum(counts.values()) for name, counts in counter.flop_counts.items()}


def multiplications(model: nn.Module, example_input: Any = None) -> int:
    """The multiplications of one evaluation, and the additions that go with them; see `branch_shares`."""
    return _count(model, example_input)['Global']


def branch_shares(model: nn.Module, blocks: Iterable[tuple[nn.Module, Sequence[str]]],
                  example_input: Any = None) -> list[float]:
    """The share of a network's multiplications that the branch of each block has.

    Args:
        model: The network.
        blocks: Each block, and the names of the modules that are its shortcut.
        example_input: See `residual_blocks`.

    Raises:
        Exception: Of any kind, where torch's counter doesn't know the network.
    """
    names = {module: f'{type(model).__name__}.{name}' for name, module in model.named_modules()}
    flops = _count(model, example_input)

    def of_branch(block: nn.Module, shortcut: Sequence[str]) -> float:
        return flops.get(names[block], 0) - sum(flops.get(names[getattr(block, name)], 0) for name in shortcut)

    return [of_branch(block, shortcut) / flops['Global'] for block, shortcut in blocks]


def shares_of_gated(model: nn.Module) -> list[float]:
    """`branch_shares` of a network of timm with stochastic depth, in the order of its gates."""
    blocks = {getattr(block, block.drop_path_slots[0]).index: (block, block.shortcut_path)
              for block in model.modules() if isinstance(block, SkippableBlock)}
    return branch_shares(model, [blocks[index] for index in sorted(blocks)])


def computed_share(model: nn.Module, gates: DepthGates) -> float:
    """The share of a network's multiplications that a training step is expected to run.

    Args:
        model: A network of timm with stochastic depth.
        gates: Its gates.
    """
    return 1. - sum(rate * share for rate, share in zip(gates.drop_path_rates, shares_of_gated(model), strict=True))

"""How many images a network classifies in a second."""
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from harness.engine import autocast
from timing.rows import spread


def inference_rates(networks: Sequence[Any], sizes: Sequence[Sequence[int]], amp: bool,
                    rounds: int) -> list[dict[str, float]]:
    """Times evaluations of a batch of random images, the networks in turns.

    Args:
        networks: They are moved to the device and to the channels_last memory layout.
        sizes: Of the batch of each, (B, C, H, W).
        amp: In bf16 autocast.
        rounds: Batches of each network, after one to warm up.

    Returns:
        Of each network, the spread of its images a second over the rounds.
    """
    device = Accelerator().device
    images = [torch.randn(*size, device=device).to(memory_format=torch.channels_last) for size in sizes]
    for network in networks:
        network.eval().to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def rate(network: Any, x: torch.Tensor) -> float:
        start = time.perf_counter()
        with autocast(device, amp)():
            network(x).float().cpu()  # waits for a GPU
        return len(x) / (time.perf_counter() - start)

    rates: list[list[float]] = [[] for _ in networks]
    for turn in tqdm(range(rounds + 1), desc='rounds', leave=False):
        for network, x, found in zip(networks, images, rates, strict=True):
            value = rate(network, x)
            if turn:
                found.append(value)
    return [spread(found) for found in rates]

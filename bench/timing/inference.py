"""How many images a network classifies in a second."""
import time
from typing import Any

import timm
import torch
from accelerate import Accelerator
from tqdm import tqdm

import timm_sd  # noqa: F401  (registers the models)
from harness.engine import autocast
from timing.rows import spread


def inference_rates(models: list[str], batch_size: int, amp: bool, rounds: int) -> list[dict[str, Any]]:
    """Times evaluations of a batch of random images, the networks in turns.

    Args:
        models: timm's names of the networks.
        batch_size: Images a batch.
        amp: In bf16 autocast.
        rounds: Batches of each network, after one to warm up.

    Returns:
        A row for each network, with the spread of `images_per_second` over the rounds.
    """
    device = Accelerator().device
    networks: dict[str, Any] = {name: timm.create_model(name).eval().to(device).to(memory_format=torch.channels_last)
                                for name in models}
    images = {name: torch.randn(batch_size, *network.pretrained_cfg['input_size'], device=device).to(
        memory_format=torch.channels_last) for name, network in networks.items()}

    @torch.inference_mode()
    def rate(name: str) -> float:
        start = time.perf_counter()
        with autocast(device, amp)():
            networks[name](images[name]).float().cpu()  # waits for a GPU
        return batch_size / (time.perf_counter() - start)

    rates: dict[str, list[float]] = {name: [] for name in models}
    for turn in tqdm(range(rounds + 1), desc='rounds', leave=False):
        for name, found in rates.items():
            value = rate(name)
            if turn:
                found.append(value)
    return [dict(model=name, batch_size=batch_size, amp=amp, images_per_second=spread(found))
            for name, found in rates.items()]

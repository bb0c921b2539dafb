"""Seeds for what draws from the global generators, as timm's transforms and its Mixup do."""
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that timm's transforms draw from: Python's, numpy's and torch's.

    A worker has no other use for them. The main process, which reads by itself with --workers 0, gets its own back.
    """
    is_main = get_worker_info() is None
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if is_main else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks all other devices too, for each image
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])

"""What a figure was measured on and with."""
import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

import timm_sd


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def hardware(accelerator: Accelerator, amp: bool) -> dict[str, Any]:
    """Device, cores, processes, threads of each, and whether the precision is bf16."""
    if accelerator.device.type == 'cuda':
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        info = Path('/proc/cpuinfo')
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
        device = f'{names[0] if names else platform.machine()}, {cores()} cores'
    return dict(device=device, cores=cores(), processes=accelerator.num_processes, threads=torch.get_num_threads(),
                amp=amp)


def versions() -> dict[str, str]:
    """Python, and the packages that decide what is computed."""
    return dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                timm_sd=timm_sd.__version__)

"""What a figure was measured on and with."""
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

import timm_sd
from harness.paths import BENCH


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def hardware(accelerator: Accelerator, amp: bool, amp_dtype: str = 'bfloat16') -> dict[str, Any]:
    """Device, cores, processes, threads of each, whether autocast was on, and its type where it isn't bfloat16."""
    if accelerator.device.type == 'cuda':
        device = torch.cuda.get_device_name(accelerator.device)
    else:
        info = Path('/proc/cpuinfo')
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
        device = f'{names[0] if names else platform.machine()}, {cores()} cores'
    return dict(device=device, cores=cores(), processes=accelerator.num_processes, threads=torch.get_num_threads(),
                amp=amp, **(dict(amp_dtype=amp_dtype) if amp and amp_dtype != 'bfloat16' else {}))


def precision(amp: bool, amp_dtype: str = 'bfloat16') -> str:
    """'bf16', 'fp16' or 'fp32'."""
    return dict(bfloat16='bf16', float16='fp16')[amp_dtype] if amp else 'fp32'


def code_digest() -> str:
    """A digest of this package's and the harness's source files: two clones may be of one version and differ."""
    files = [BENCH / 'train.py', *(BENCH / 'harness').rglob('*.py'), *Path(timm_sd.__file__).parent.rglob('*.py')]
    texts = sorted(path.read_text(encoding='utf-8') for path in files)  # of any line endings
    return hashlib.sha256('\0'.join(texts).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Python, and the packages that decide what is computed."""
    return dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
                timm_sd=timm_sd.__version__)

"""timm's own train.py with `python -m timm_sd --drop-path-mode batch` in front of it and without: its images a second.

They are those of timm's log, one line an update, without the first two updates of each run.
"""
import re
import statistics
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from harness.errors import UserError
from timing.end_to_end import EndToEndSettings, write_subset
from timing.rows import spread

WARM_UP = 2  # updates
UPDATE = re.compile(r'Train: .* Time: ([\d.]+)s,')
SHARE = re.compile(r'a training step runs (\d+)% of the multiplications')


def run_training(command: list[str]) -> str:
    """What a training prints.

    Raises:
        UserError: If it fails.
    """
    result = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise UserError(f'{" ".join(command[:6])} failed: {result.stdout[-1500:]}')
    return result.stdout


def measure_prefix(model: str, drop_paths: list[float], schedule: str, scale: str, batch_size: int, amp: bool,
                   rounds: int, settings: EndToEndSettings) -> list[dict[str, Any]]:
    """Trains one epoch with the prefix and one without, in turns.

    Args:
        model: timm's name of the network.
        drop_paths: What --drop-path is given.
        schedule: Of the prefix; timm's DropPath is linear.
        scale: Of the prefix.
        batch_size: Images an update.
        amp: Train in bf16 autocast.
        rounds: Turns; each has a seed, and so gates, of its own.
        settings: The script, and how many images.

    Returns:
        For each rate a row with the images a second of both, their ratio within a round, and the share of the
        multiplications that the prefix says is left.
    """
    prefix = ['-m', 'timm_sd', '--drop-path-mode', 'batch', '--drop-path-schedule', schedule,
              '--drop-path-scale', scale]
    speeds: dict[tuple[float, bool], list[float]] = {}
    shares = {}
    with tempfile.TemporaryDirectory() as scratch:
        write_subset(Path(scratch), settings)
        turns = [(rate, prefixed) for rate in drop_paths for prefixed in (True, False)]
        for round_, (rate, prefixed) in tqdm(list(product(range(rounds), turns)), desc=model):
            log = run_training([
                *(prefix if prefixed else []), str(settings.timm_train), '--model', model, '--drop-path', str(rate),
                '--dataset', f'hfds/{scratch}', '--input-key', 'img', '--target-key', 'label', '--num-classes', '10',
                '--val-split', '', '--no-aug', '--channels-last', '-b', str(batch_size), '-j', '1', '--device', 'cpu',
                *(['--amp', '--amp-dtype', 'bfloat16'] if amp else []), '--opt', 'sgd', '--lr', '0.001', '--epochs',
                '1', '--warmup-epochs', '0', '--log-interval', '1', '--seed', str(round_), '--output',
                f'{scratch}/output'])
            seconds = [float(found[1]) for found in UPDATE.finditer(log)][WARM_UP:]
            if not seconds:
                raise UserError(f'--images {settings.images} make no more than {WARM_UP} updates of -b {batch_size}')
            speeds.setdefault((rate, prefixed), []).append(batch_size / statistics.mean(seconds))
            if prefixed:
                shares[rate] = int(SHARE.findall(log)[0]) / 100
    return [dict(
        model=model, drop_path=rate, schedule=schedule, scale=scale, batch_size=batch_size,
        images_per_second=round(statistics.median(speeds[rate, True]), 1),
        timm_images_per_second=round(statistics.median(speeds[rate, False]), 1),
        faster=spread([ours / theirs for ours, theirs in zip(speeds[rate, True], speeds[rate, False], strict=True)]),
        multiplications=shares[rate]) for rate in drop_paths]

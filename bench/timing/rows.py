"""The rows of throughput.py: how they are made of what was timed, and found again in its JSON files."""
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from timing.contestants import CONSTANT, RECORDED, StepSettings, Variant, peak_memory, time_in_turns
from timing.end_to_end import EndToEndSettings, Training, time_epochs


class SweepPoint(NamedTuple):
    """A point of the sweep: which axis it lies on and where, and what is changed there."""
    axis: str
    value: float
    model: str | None = None
    batch_size: int | None = None
    drop_path: float | None = None


SWEEP = (
    *(SweepPoint('depth', depth, model=f'sd_resnet{depth}_cifar') for depth in (20, 56, 110, 152, 1202)),
    *(SweepPoint('batch_size', size, batch_size=size) for size in (32, 64, 128, 256)),
    *(SweepPoint('drop_path', rate, drop_path=rate) for rate in (0.2, 0.5, 0.8)),
)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return dict(median=round(middle, 4), q1=round(low, 4), q3=round(high, 4))


def measure(model: str, variants: list[Variant], steps: StepSettings) -> list[dict[str, Any]]:
    """Times the variants on one network and probes their memory; a row for each, and one for the whole loop."""
    timings = time_in_turns(model, variants, steps)
    constant = timings.seconds[CONSTANT]

    def row(variant: Variant, seconds: list[float], loop: bool) -> dict[str, Any]:
        name = f'loop{", graphs" if variant.cuda_graphs else ""}' if loop else variant.label
        return dict(model=model, name=name, **variant._asdict(), loop=loop, batch_size=steps.batch_size,
                    step_seconds=spread(seconds),
                    images_per_second=round(steps.batch_size / statistics.median(seconds), 1),
                    ratio=spread([own / other for own, other in zip(seconds, constant, strict=True)]))

    rows = []
    for variant, seconds in timings.seconds.items():
        rows.append(dict(row(variant, seconds, loop=False), host_seconds=spread(timings.host_seconds[variant])))
        if steps.memory:
            rows[-1]['peak_mib'] = peak_memory(model, variant, steps)
        if variant.mode == 'batch' and not variant.compiled:
            full = timings.seconds[RECORDED if variant.cuda_graphs else CONSTANT]
            rows[-1].update(saving(timings.draws[variant], timings.block_seconds[variant.cuda_graphs], seconds, full,
                                   constant))
    for variant, seconds in timings.loops.items():
        rows.append(row(variant, seconds, loop=True))
        rows[-1]['images_to_bare'] = spread(
            [bare / whole for bare, whole in zip(timings.seconds[variant], seconds, strict=True)])
    return rows


def saving(draws: list[list[list[bool]]], block_seconds: list[float], seconds: list[float], full: list[float],
           constant: list[float]) -> dict[str, Any]:
    """What the gates of each round let one save, and the share of it that was saved in that same round.

    Args:
        draws: The gates of each step in each round.
        block_seconds: What each block costs; empty where that isn't known.
        seconds: A step's, in each round.
        full: Those of constant depth, recorded if these are recorded.
        constant: Those of constant depth, eager: the limit is a ratio to it, as all ratios are.
    """
    steps = [draw for of_round in draws for draw in of_round]
    found: dict[str, Any] = dict(blocks_open=round(statistics.mean(sum(draw) / len(draw) for draw in steps), 4))
    if block_seconds:
        savable = [statistics.mean(sum(cost for cost, is_open in zip(block_seconds, draw, strict=True) if not is_open)
                                   for draw in of_round) for of_round in draws]
        limit = (statistics.median(full) - statistics.mean(savable)) / statistics.median(constant)
        found['limit'] = round(limit, 4)
        found['share_of_saving'] = spread([(whole - own) / most for whole, own, most
                                           in zip(full, seconds, savable, strict=True)])
    return found


def measure_sweep(model: str, drop_path: float, schedule: str, steps: StepSettings) -> list[dict[str, Any]]:
    """Constant depth and mode 'batch' over depth, batch and p_L, one thing changed at a time; see `SWEEP`."""
    rows = []
    for point in tqdm(SWEEP, desc='sweep'):
        variants = [CONSTANT, Variant('batch', point.drop_path or drop_path, schedule)]
        changed = replace(steps, batch_size=point.batch_size or steps.batch_size)
        rows += [dict(axis=point.axis, value=point.value, **row)
                 for row in measure(point.model or model, variants, changed) if not row['loop']]
    return rows


def measure_epochs(model: str, drop_path: float, batch_size: int, amp: bool,
                   settings: EndToEndSettings) -> list[dict[str, Any]]:
    """Whole epochs; the ratios are to timm's train.py where it is given, otherwise to ours by itself."""
    seconds = time_epochs(model, drop_path, batch_size, amp, settings)
    base = statistics.median(seconds.get(Training('timm'), seconds[Training('timm_sd')]))
    return [dict(model=model, name=training.label, **training._asdict(), batch_size=batch_size,
                 step_seconds=spread([value * batch_size / settings.images for value in values]),
                 images_per_second=round(settings.images / statistics.median(values), 1),
                 ratio=spread([value / base for value in values])) for training, values in seconds.items()]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for CSV, a spread as three columns."""
    return {f'{key}_{part}' if part else key: entry for key, value in row.items()
            for part, entry in (value.items() if isinstance(value, dict) else [('', value)])}


def find_row(folder: Path, model: str, variant: Variant) -> dict[str, Any] | None:
    """The row of a network's variant in one of the JSON files of a folder, with its `hardware`; None without one."""
    for path in sorted(folder.glob('throughput*.json')):
        measured = json.loads(path.read_text())
        for row in measured['rows']:
            if row['model'] == model and variant.describes(row):
                return dict(row, hardware=measured['hardware'])
    return None


def ratios(folder: Path, model: str,
           variants: dict[str, Variant]) -> list[tuple[dict[str, Any], dict[str, dict[str, float]]]]:
    """A network's steps of `variants` in each of the JSON files of a folder: its hardware, and the ratios by key."""
    found = []
    for path in sorted(folder.glob('throughput*.json')):
        measured = json.loads(path.read_text())
        found.append((measured['hardware'], {key: row['ratio'] for key, variant in variants.items()
                                             for row in measured['rows']
                                             if row['model'] == model and variant.describes(row)}))
    return found

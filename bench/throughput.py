"""What stochastic depth saves: step time and peak memory against constant depth, and the share of what can be saved.

    python bench/throughput.py --drop-path 0.5 0.8                    # constant depth, this project, timm's DropPath
    python bench/throughput.py --modes constant batch torchvision-row --compiled
    python bench/throughput.py --model resnet50 vit_small_patch16_224 --drop-path-schedule uniform -b 8
    python bench/throughput.py --sweep                                # over depth, batch and p_L
    python bench/throughput.py --end-to-end --timm-train train.py     # whole epochs, also with timm's own script

Prints a table; `--output PREFIX` writes PREFIX.json, PREFIX.csv and PREFIX.png. Ratios are taken within a round of
turns and quoted as the median and the quartiles over the rounds; warm-up stays outside.
"""
import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

import timm_sd
from config import Parser, UserError, check_model_name, count, number, parse, rate, run
from contestants import MODES, Contestant, Entry, build, has_stages, peak_memory, time_in_turns
from end_to_end import time_epochs
from engine import default_amp
from figures import save_ratios, save_sweep
from run_folder import hardware, versions, write_atomic, write_csv

SWEEP: tuple[dict[str, Any], ...] = (
    *(dict(axis='depth', at=depth, model=f'sd_resnet{depth}_cifar') for depth in (20, 56, 110, 152, 1202)),
    *(dict(axis='batch_size', at=size, batch_size=size) for size in (32, 64, 128, 256)),
    *(dict(axis='drop_path', at=value, drop_path=value) for value in (0.2, 0.5, 0.8)),
)


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return dict(median=round(middle, 4), q1=round(low, 4), q3=round(high, 4))


def measure(model: str, entries: list[Entry], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Times the entries on one network and probes their memory; a row for each, and one for the whole loop."""
    timings = time_in_turns(model, entries, args)
    constant = timings.seconds[Entry('constant', 0.).name]
    rows = []
    for name, seconds in timings.seconds.items():
        entry = next((entry for entry in entries if entry.name == name), None)
        row = dict(model=model, name=name, batch_size=args.batch_size, step_seconds=spread(seconds),
                   images_per_second=round(args.batch_size / statistics.median(seconds), 1),
                   ratio=spread([own / other for own, other in zip(seconds, constant, strict=True)]))
        if name == 'loop':
            bare = timings.seconds[next(entry.name for entry in entries if entry.mode == 'batch')]
            row['images_to_bare'] = spread([other / own for other, own in zip(bare, seconds, strict=True)])
        if entry is not None and args.memory:
            row['peak_mib'] = peak_memory(model, entry, args)
        if entry is not None and entry.mode == 'batch' and not entry.compiled:
            row.update(saving(timings.draws[name], timings.block_seconds, seconds, constant))
        rows.append(row)
    return rows


def saving(draws: list[list[list[bool]]], block_seconds: list[float], seconds: list[float],
           constant: list[float]) -> dict[str, Any]:
    """What the gates of each round let one save, and the share of it that was saved in that same round."""
    steps = [draw for of_round in draws for draw in of_round]
    found: dict[str, Any] = dict(blocks_open=round(statistics.mean(sum(draw) / len(draw) for draw in steps), 4))
    if block_seconds:
        savable = [statistics.mean(sum(cost for cost, is_open in zip(block_seconds, draw, strict=True) if not is_open)
                                   for draw in of_round) for of_round in draws]
        found['limit'] = round(1 - statistics.mean(savable) / statistics.median(constant), 4)
        found['share_of_saving'] = spread([(full - own) / most for full, own, most
                                           in zip(constant, seconds, savable, strict=True)])
    return found


def end_to_end(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole epochs; the ratios are to timm's train.py where it is given, otherwise to ours by itself."""
    epochs = time_epochs(model, args)
    base = statistics.median(epochs.get("timm's train.py", epochs['train.py']))
    return [dict(model=model, name=name, batch_size=args.batch_size,
                 step_seconds=spread([value * args.batch_size / args.images for value in values]),
                 images_per_second=round(args.images / statistics.median(values), 1),
                 ratio=spread([value / base for value in values])) for name, values in epochs.items()]


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Constant depth and mode batch over depth, batch and p_L, one thing changed at a time."""
    rows = []
    for point in tqdm(SWEEP, desc='sweep'):
        changed = argparse.Namespace(**{**vars(args), 'batch_size': point.get('batch_size', args.batch_size)})
        entries = [Entry('constant', 0.),
                   Entry('batch', point.get('drop_path', args.drop_path[0]), args.drop_path_schedule)]
        model = point.get('model', args.model[0])
        rows += [dict(axis=point['axis'], at=point['at'], **row)
                 for row in measure(model, entries, changed) if row['name'] != 'loop']
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row; what wasn't measured stays empty."""
    print(f'{"network":20}{"":32}{"batch":>6}{"s/step":>9}{"images/s":>10}{"ratio":>8}   {"quartiles":16}{"limit":>7}'
          f'{"share":>7}{"MiB":>8}')
    for row in rows:
        ratio, share = row['ratio'], row.get('share_of_saving', {}).get('median', '')
        print(f'{row["model"]:20}{row["name"]:32}{row["batch_size"]:6}{row["step_seconds"]["median"]:9.4f}'
              f'{row["images_per_second"]:10.1f}{ratio["median"]:8.3f}   {ratio["q1"]:.3f} to {ratio["q3"]:.3f}  '
              f'{row.get("limit", ""):>7}{share:>7}{row.get("peak_mib", ""):>8}')


def print_profile(model: str, entry: Entry, args: argparse.Namespace) -> None:
    """The operators of a turn of training steps by the time they take themselves."""
    contestant = Contestant(build(model, entry), args, entry.compiled)
    contestant.bare()
    with torch.profiler.profile() as profile:
        contestant.bare()
    sort_by = 'self_cpu_time_total' if contestant.accelerator.device.type == 'cpu' else 'self_device_time_total'
    print(f'{model}, {entry.name}, {args.steps} steps')
    print(profile.key_averages().table(sort_by=sort_by, row_limit=16, max_name_column_width=40))


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row for CSV, a spread as three columns."""
    return {f'{key}_{part}' if part else key: entry for key, value in row.items()
            for part, entry in (value.items() if isinstance(value, dict) else [('', value)])}


def throughput_parser() -> Parser:
    """The flags."""
    parser = Parser('Times stochastic depth against constant depth.')
    parser.add_argument('--model', nargs='+', default=['sd_resnet110_cifar'])
    parser.add_argument('--modes', nargs='+', choices=MODES, default=['constant', 'batch', 'sample'])
    parser.add_argument('--drop-path', nargs='+', type=rate, default=[0.5], help='1 - p_L, above 0')
    parser.add_argument('--drop-path-schedule', choices=timm_sd.SCHEDULES, default='linear')
    parser.add_argument('--drop-path-scale', choices=timm_sd.SCALES, default='train', help='of mode batch')
    parser.add_argument('--compiled', action='store_true', help='time each mode with compiled branches too')
    parser.add_argument('--torchcompile-mode', help='of torch.compile, such as reduce-overhead (CUDA graphs)')
    parser.add_argument('-b', '--batch-size', type=count, default=128)
    parser.add_argument('--steps', type=count, default=2, help='steps a turn')
    parser.add_argument('--rounds', type=number(int, 2), default=40, help='turns of each contestant, at least 2')
    parser.add_argument('--amp', action=argparse.BooleanOptionalAction, help='bf16 autocast (default: if faster)')
    parser.add_argument('--grad-checkpointing', action='store_true', help='recompute activations to save memory')
    parser.add_argument('--memory', action=argparse.BooleanOptionalAction, default=True, help='probe the peak memory')
    parser.add_argument('--sweep', action='store_true', help='how the cost grows with depth, batch and p_L')
    parser.add_argument('--profile', action='store_true', help='the operators of a step, with their times and counts')
    parser.add_argument('--end-to-end', action='store_true', help='whole epochs of train.py, on the CPU')
    parser.add_argument('--timm-train', help="path of timm's train.py, to be timed beside it")
    parser.add_argument('--data-dir', help='end to end: folder of parquet files (default: generated pictures)')
    parser.add_argument('--images', type=count, default=6400, help='end to end: training images an epoch')
    parser.add_argument('--epochs', type=number(int, 3), default=3, help='end to end: epochs, the first to warm up')
    parser.add_argument('--repeats', type=number(int, 1), default=2, help='end to end: turns of each contestant')
    parser.add_argument('--output', metavar='PREFIX', help='writes PREFIX.json, PREFIX.csv and PREFIX.png')
    return parser


def check(args: argparse.Namespace) -> None:
    """What argparse can't check."""
    for name in args.model:
        check_model_name(name)
        if args.sweep and not has_stages(name):
            raise UserError(f'--model {name} is none of the sd_resnet*_cifar, which --sweep goes over')
    if min(args.drop_path) == 0:
        raise UserError('--drop-path 0 saves nothing; give a rate above 0')
    if 'constant' not in args.modes:
        raise UserError(f'--modes {" ".join(args.modes)} lacks constant, which the others are compared with')
    if args.timm_train is not None and not Path(args.timm_train).is_file():
        raise UserError(f"--timm-train {args.timm_train} is no file; give the train.py of a clone of timm's repository")


def main() -> None:
    """Measures, prints a table and writes JSON, CSV and a picture."""
    args = parse(throughput_parser())
    check(args)
    accelerator = Accelerator(cpu=args.end_to_end)  # whose trainings are told so
    amp = default_amp(accelerator.device.type) if args.amp is None else args.amp
    scales = {'batch': args.drop_path_scale}  # the others know 'train' alone
    entries = [Entry(mode, value, args.drop_path_schedule, compiled, scales.get(mode, 'train'))
               for compiled in ([False, True] if args.compiled else [False])
               for mode in args.modes for value in ([0.] if mode == 'constant' else args.drop_path)]
    if args.profile:
        for name in args.model:
            for entry in entries:
                print_profile(name, entry, args)
        return
    if args.end_to_end:
        rows, draw = [row for name in args.model for row in end_to_end(name, args)], save_ratios
    elif args.sweep:
        rows, draw = sweep(args), save_sweep
    else:
        rows, draw = [row for name in args.model for row in measure(name, entries, args)], save_ratios
    print_table(rows)
    if args.output:
        prefix = Path(args.output)
        flags = dict(vars(args), timm_train=args.timm_train and Path(args.timm_train).name,
                     output=prefix.name)  # their places say nothing
        results = dict(rows=rows, args=flags, hardware=hardware(accelerator, amp), versions=versions())
        write_atomic(prefix.with_suffix('.json'), (json.dumps(results, indent=2) + '\n').encode())
        write_csv(prefix.with_suffix('.csv'), [flat(row) for row in rows])
        draw(rows, prefix.with_suffix('.png'))


if __name__ == '__main__':
    run(main)

"""What stochastic depth saves: step time and peak memory against constant depth, and the share of what can be saved.

    python bench/throughput.py --drop-path 0.5 0.8                    # constant depth, this project, timm's DropPath
    python bench/throughput.py --modes constant batch torchvision-row --compiled
    python bench/throughput.py --cuda-graphs                          # recorded steps beside eager ones, for a GPU
    python bench/throughput.py --verify                               # do recorded steps compute what eager ones do?
    python bench/throughput.py --model resnet50 vit_small_patch16_224 --drop-path-schedule uniform -b 8
    python bench/throughput.py --sweep                                # over depth, batch and p_L
    python bench/throughput.py --end-to-end --timm-train train.py     # whole epochs, also with timm's own script
    python bench/throughput.py --host --rounds 200                    # Python and autograd of a block's gate
    python bench/throughput.py --inference --no-amp --model sd_resnet20_cifar   # images/s of a trained network
    python bench/throughput.py --reading --images 20000               # opening and reading large images, beside timm's
    python bench/throughput.py --prefix --timm-train train.py --model resnet50    # timm's train.py, with our prefix

Prints a table; `--output PREFIX` writes PREFIX.json, PREFIX.csv and PREFIX.png. Ratios are taken within a round of
turns and quoted as the median and the quartiles over the rounds; warm-up stays outside.
"""
import harness.interrupts  # noqa: F401  (before the imports that take seconds)

# isort: split
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator

import timm_sd
from harness.cli import Parser, add_flags, drop_rate, flag, make_settings, run_script
from harness.engine import default_amp
from harness.errors import UserError
from harness.files import file_to_replace, make_folder, write_csv, write_json
from harness.graphs import check_recordable
from harness.machine import hardware, versions
from harness.network import DepthSettings, registered_name
from timing.contestants import CONSTANT, DROPS, Contestant, StepSettings, Variant, build, has_stages
from timing.end_to_end import EndToEndSettings
from timing.host import host_costs
from timing.inference import inference_rates
from timing.plots import save_ratios, save_sweep
from timing.prefix import measure_prefix
from timing.reading import ReadingSettings, measure_reading, print_reading
from timing.rows import flat, measure, measure_epochs, measure_sweep
from timing.verify import describe, is_right, verify

KINDS = ('sweep', 'profile', 'end_to_end', 'host', 'verify', 'prefix', 'reading', 'inference')


@dataclass(frozen=True)
class ContestantSettings:
    """Contestants."""
    model: list[str] = flag(['sd_resnet110_cifar'], "timm's names of the networks", nargs='+')
    modes: list[str] = flag(['constant', 'batch', 'sample'], 'ways of dropping', nargs='+', choices=DROPS)
    drop_path: list[float] = flag([0.5], '1 - p_L, above 0', nargs='+', type=drop_rate)
    drop_path_schedule: str = flag('linear', 'of p_l over the blocks', choices=timm_sd.SCHEDULES)
    drop_path_scale: str = flag('train', 'of mode batch', choices=timm_sd.SCALES)
    compiled: bool = flag(False, 'time each mode with compiled branches too')
    cuda_graphs: bool = flag(False, 'time modes constant and batch of sd_resnet*_cifar as CUDA graphs too (on a CPU: '
                                    'the stand-in, to try it)')

    def variants(self) -> list[Variant]:
        """The contestants on each network; modes other than 'batch' know the scale 'train' alone."""
        plain = [CONSTANT if mode == 'constant' else Variant(
            mode, value, self.drop_path_schedule, self.drop_path_scale if mode == 'batch' else 'train')
            for mode in self.modes for value in (self.drop_path if mode != 'constant' else [0.])]
        plain += [variant._replace(compiled=True) for variant in plain if self.compiled]
        return plain + [variant._replace(cuda_graphs=True) for variant in plain
                        if self.cuda_graphs and variant.mode in ('constant', 'batch')]

    def verified(self) -> list[Variant]:
        """What is compared with its recording: constant depth, and mode 'batch' with both scales."""
        dropping = [Variant('batch', rate, self.drop_path_schedule, scale)
                    for rate in self.drop_path for scale in timm_sd.SCALES]
        return [variant for variant in (CONSTANT, *dropping) if variant.mode in self.modes]


@dataclass(frozen=True)
class MeasurementSettings:
    """What is measured, and where it goes."""
    sweep: bool = flag(False, 'how the cost grows with depth, batch and p_L')
    profile: bool = flag(False, 'the operators of a step, with their times and counts')
    end_to_end: bool = flag(False, 'whole epochs of train.py, on the CPU')
    host: bool = flag(False, 'what the gate of a block costs the host, in microseconds')
    verify: bool = flag(False, 'whether recorded steps compute what eager ones do, and eager ones what they did, in '
                               'fp32 and bf16 and with both scales')
    prefix: bool = flag(False, "timm's train.py with python -m timm_sd in front and without, on the CPU")
    reading: bool = flag(False, "how fast large images are opened and read, beside timm's loader")
    inference: bool = flag(False, 'how many images a trained network classifies in a second')
    output: str | None = flag(None, 'writes PREFIX.json, PREFIX.csv and PREFIX.png', metavar='PREFIX')


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a row; what wasn't measured stays empty."""
    print(f'{"network":20}{"":44}{"batch":>6}{"s/step":>9}{"images/s":>10}{"ratio":>8}   {"quartiles":16}{"limit":>7}'
          f'{"share":>7}{"host s":>9}{"MiB":>8}')
    for row in rows:
        ratio, share = row['ratio'], row.get('share_of_saving', {}).get('median', '')
        host = f'{row["host_seconds"]["median"]:.4f}' if 'host_seconds' in row else ''
        print(f'{row["model"]:20}{row["name"]:44}{row["batch_size"]:6}{row["step_seconds"]["median"]:9.4f}'
              f'{row["images_per_second"]:10.1f}{ratio["median"]:8.3f}   {ratio["q1"]:.3f} to {ratio["q3"]:.3f}  '
              f'{row.get("limit", ""):>7}{share:>7}{host:>9}{row.get("peak_mib", ""):>8}')


def print_profiles(model: str, variants: list[Variant], steps: StepSettings) -> None:
    """The operators of a turn of training steps by the time they take themselves, and on a GPU the kernels a step."""
    contestants = {variant: Contestant(build(model, variant), steps, variant.compiled, variant.cuda_graphs)
                   for variant in variants}
    for contestant in contestants.values():  # to warm up; what is recorded after a profile may be missing in the next
        contestant.bare()
    for variant, contestant in contestants.items():
        with torch.profiler.profile() as profile:
            contestant.time_turn(contestant.bare, 0)
        on_cpu = contestant.step.accelerator.device.type == 'cpu'
        averages = profile.key_averages()
        kernels = '' if on_cpu else f', {count_kernels(averages) / steps.steps:.0f} kernels and copies a step'
        print(f'{model}, {variant.label}, {steps.steps} steps{kernels}')
        print(averages.table(sort_by='self_cpu_time_total' if on_cpu else 'self_device_time_total', row_limit=16,
                             max_name_column_width=40))


def count_kernels(events: Any) -> int:
    """What ran on a GPU, of torch.profiler's averages."""
    return sum(event.count for event in events if event.device_type == torch.autograd.DeviceType.CUDA)


def check(contestants: ContestantSettings, what: MeasurementSettings, end_to_end: EndToEndSettings) -> None:
    """What argparse can't check."""
    for name in contestants.model:
        registered_name(name)
        if what.sweep and not has_stages(name):
            raise UserError(f'--model {name} is none of the sd_resnet*_cifar, which --sweep goes over')
    kinds = [f'--{kind.replace("_", "-")}' for kind in KINDS if getattr(what, kind)]
    if len(kinds) > 1:
        raise UserError(f'{" and ".join(kinds)} do different things; give one')
    if contestants.cuda_graphs and not {*kinds} <= {'--profile', '--verify'}:
        raise UserError('--cuda-graphs goes with the table of steps, --profile and --verify; leave it out')
    if what.prefix and end_to_end.timm_train is None:
        raise UserError("--prefix runs timm's train.py; say with --timm-train where it is")
    if min(contestants.drop_path) == 0:
        raise UserError('--drop-path 0 saves nothing; give a rate above 0')
    if 'constant' not in contestants.modes and not what.verify:
        raise UserError(f'--modes {" ".join(contestants.modes)} lacks constant, which the others are compared with')
    if end_to_end.timm_train is not None and not Path(end_to_end.timm_train).is_file():
        raise UserError(f"--timm-train {end_to_end.timm_train} is no file; give the train.py of a clone of timm's "
                        'repository')


def write(prefix: Path, rows: list[dict[str, Any]], flags: dict[str, Any], machine: dict[str, Any]) -> None:
    """Writes JSON, CSV and, of ratios, a picture. Paths lose their folders, which mean nothing on another machine."""
    args = dict(flags, output=prefix.name, **{
        key: flags[key] and Path(flags[key]).name for key in ('timm_train', 'data_dir')})
    write_json(prefix.with_suffix('.json'), dict(rows=rows, args=args, hardware=machine, versions=versions()))
    write_csv(prefix.with_suffix('.csv'), [flat(row) for row in rows])
    if any(flags[kind] for kind in ('host', 'prefix', 'verify', 'reading', 'inference')):
        return
    (save_sweep if flags['sweep'] else save_ratios)(rows, prefix.with_suffix('.png'))


def main() -> None:
    """Measures, prints a table and writes JSON, CSV and a picture."""
    parser = Parser('Times stochastic depth against constant depth.')
    add_flags(parser, ContestantSettings, StepSettings, EndToEndSettings, ReadingSettings, MeasurementSettings)
    flags = parser.parse_args()
    contestants, steps = make_settings(ContestantSettings, flags), make_settings(StepSettings, flags)
    end_to_end, what = make_settings(EndToEndSettings, flags), make_settings(MeasurementSettings, flags)
    check(contestants, what, end_to_end)
    if what.output:
        make_folder(Path(what.output).parent, '--output')
        for suffix in ('.json', '.csv', '.png'):  # before what may take an hour
            file_to_replace(Path(what.output).with_suffix(suffix), '--output')
    accelerator = Accelerator(cpu=what.end_to_end or what.host or what.prefix)  # as train.py runs there
    if contestants.cuda_graphs or what.verify:
        depth = DepthSettings(grad_checkpointing=steps.grad_checkpointing, torchcompile_mode=steps.torchcompile_mode)
        for name in contestants.model:
            check_recordable(build(name, CONSTANT), depth, True, accelerator)
    amp = default_amp(accelerator.device.type) if steps.amp is None else steps.amp
    rate, variants = contestants.drop_path[0], contestants.variants()
    if what.profile:
        for name in contestants.model:
            print_profiles(name, variants, steps)
        return
    if what.verify:
        rows = [row for name in contestants.model for variant in contestants.verified()
                for row in verify(name, variant, steps.batch_size)]
    elif what.host:
        rows = host_costs(steps.rounds)
    elif what.inference:
        networks: Any = [timm.create_model(name) for name in contestants.model]
        sizes = [(steps.batch_size, *network.pretrained_cfg['input_size']) for network in networks]
        rows = [dict(model=name, batch_size=steps.batch_size, amp=amp, images_per_second=rate) for name, rate
                in zip(contestants.model, inference_rates(networks, sizes, amp, steps.rounds), strict=True)]
    elif what.reading:
        rows = measure_reading(end_to_end.images, end_to_end.data_dir, steps.batch_size, steps.rounds,
                               make_settings(ReadingSettings, flags))
    elif what.prefix:
        rows = [row for name in contestants.model for row in measure_prefix(
            name, contestants.drop_path, contestants.drop_path_schedule, contestants.drop_path_scale, steps.batch_size,
            amp, steps.rounds, end_to_end)]
    elif what.sweep:
        rows = measure_sweep(contestants.model[0], rate, contestants.drop_path_schedule, steps)
    elif what.end_to_end:
        rows = [row for name in contestants.model
                for row in measure_epochs(name, rate, steps.batch_size, amp, end_to_end)]
    else:
        rows = [row for name in contestants.model for row in measure(name, variants, steps)]
    if what.verify:
        print(*map(describe, rows), sep='\n')
    elif what.host:
        for row in rows:
            print('{name:40}{median:7.1f} us   {q1:.1f} to {q3:.1f}'.format(**row, **row['microseconds']))
    elif what.inference:
        for row in rows:
            print('{model:32}{median:9.0f} images/s   {q1:.0f} to {q3:.0f}'.format(**row, **row['images_per_second']))
    elif what.reading:
        print_reading(rows)
    elif what.prefix:
        for row in rows:
            print('{model:32}{drop_path:5}{timm_images_per_second:9.1f} images/s {images_per_second:9.1f}   '
                  '{median:.2f} times ({q1:.2f} to {q3:.2f}), {multiplications:.0%}'.format(**row, **row['faster']))
    else:
        print_table(rows)
    if what.output:
        write(Path(what.output), rows, vars(flags), hardware(accelerator, amp))
    if what.verify and not is_right(rows):
        sys.exit('the recorded step differs by more than the eager one does from itself')


if __name__ == '__main__':
    run_script(main)

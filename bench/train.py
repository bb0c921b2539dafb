"""Trains a network with stochastic depth: accelerate launch bench/train.py -c RECIPE [timm's flags].

Without arguments it runs the recipe `quickstart`, on data that scikit-learn ships, in under a minute.
"""
import harness.interrupts  # noqa: F401  (before the imports that take seconds)

# isort: split
import json
import sys
import textwrap
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from harness.cli import make_settings, run_script
from harness.data.loaders import make_batches
from harness.data.mixing import make_mix
from harness.data.splits import load_splits
from harness.errors import UserError
from harness.graphs import check_recordable
from harness.launch import LaunchSettings, describe_processes, join_processes
from harness.launcher import settle_precision
from harness.loss import make_loss
from harness.machine import code_digest, precision, versions
from harness.network import (
    build_network,
    check_initial_classes,
    digest_of,
    first_branch_weight,
    registered_name,
    set_drop_path_when,
)
from harness.optimizer import build_optimizer, make_clip
from harness.ranks import check_same, from_main_process
from harness.recipes import TrainFlags, effective, group_flags, parse_train_flags
from harness.results import closing_lines, finish, last_drop_rate, public_flags
from harness.resume import open_run_folder
from harness.tracking import TrackingSettings, check_trackers, start_trackers
from harness.training import Trainer


def build_trainer(flags: TrainFlags, accelerator: Accelerator) -> Trainer:
    """Checks and makes everything that the training needs; the run folder comes last.

    Raises:
        UserError: If a flag doesn't suit the data or the network; then nothing was written.
    """
    channels, seed = flags.network.channels, flags.training.seed
    data = load_splits(flags.source, flags.splits, flags.images, accelerator, channels,
                       progress=accelerator.is_main_process and sys.stderr.isatty())
    check_same(accelerator, {f'{key} of the data': value for key, value in data.record['data'].items()
                             if key != 'folder'})  # each machine may have its own name for it
    check_initial_classes(flags.depth.initial_checkpoint, data.class_names)
    torch.manual_seed(seed)
    model = build_network(flags.network, flags.depth, len(data.class_names), seed,
                          img_size=flags.images.img_size).to(accelerator.device)
    if flags.network.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if flags.images.batch_size == 1 and any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        raise UserError('--batch-size 1 gives batch norm one image, which has no variance; give 2 or more')
    if flags.training.cuda_graphs:
        check_recordable(model, flags.depth, flags.images.in_memory, accelerator, flags.network.amp_dtype)
    if flags.depth.sync_bn and accelerator.device.type == 'cpu':
        raise UserError('--sync-bn: torch has it on GPUs alone; leave it out')
    evaluated = replace(flags.images, batch_size=flags.splits.validation_batch_size or flags.images.batch_size)
    batches = {name: make_batches(images, flags.images if name == 'train' else evaluated, model.pretrained_cfg,
                                  accelerator, flags.augmentation if name == 'train' else None, seed, channels,
                                  flags.splits.epoch_size)
               for name, images in data.images.items()}
    mix = make_mix(flags.augmentation, batches['train'], len(data.class_names), flags.loss.smoothing)
    loss, clip = make_loss(flags.loss), make_clip(flags.optimizer)
    optimizer, scheduler, epochs = build_optimizer(flags.optimizer, model, len(batches['train']))
    set_drop_path_when(model, flags.depth, epochs)
    watched = first_branch_weight(model) if flags.training.log_gradients else None
    size = flags.images.img_size or model.pretrained_cfg['input_size'][-1]
    folder = open_run_folder(flags.folder, flags.record, accelerator, f'{flags.network.model}-{size}', effective)
    return Trainer(
        settings=flags.training, epochs=epochs, model=model, optimizer=optimizer, scheduler=scheduler, batches=batches,
        accelerator=accelerator, amp=flags.record['amp'], amp_dtype=flags.record['amp_dtype'], folder=folder,
        data=data, watched=watched, loss=loss, mix=mix, clip=clip)


def header(trainer: Trainer, flags: TrainFlags) -> str:
    """Two lines: device, precision, processes, network, data, gates; and the classes."""
    gates, rate, network = trainer.gates, last_drop_rate(trainer, flags), flags.network
    over_time = '' if gates is None or gates.over_time is None else f', {gates.over_time.describe()}'
    if rate == 0:
        depth = 'constant depth'
    elif gates is None or gates.mode == 'sample':
        depth = f"p_L {1 - rate:g}{over_time}, timm's DropPath"
    else:
        depth = f'p_L {1 - rate:g}{over_time}, expected depth {gates.mean_depth:.1f} of {len(gates.open)} blocks'
    names = trainer.data.class_names
    sizes = '/'.join(str(batches.images or '?') for batches in trainer.batches.values())
    return (f'{trainer.accelerator.device} ({torch.get_num_threads()} threads), '
            f'{precision(trainer.amp, trainer.amp_dtype)}{", channels_last" if network.channels_last else ""}'
            f'{", CUDA graphs" if flags.training.cuda_graphs else ""} | '
            f'{describe_processes(trainer.accelerator)} x batch {flags.images.batch_size} | {network.model}'
            f'{f" (compiled {flags.depth.compile})" if flags.depth.compile else ""} | '
            f'{flags.source.name} {sizes} train/val/test | {depth} | {trainer.folder.path}\n'
            + textwrap.shorten(f'{len(names)} classes: {", ".join(names)}', 120, placeholder=' ...'))


def check_ranks(flags: dict[str, Any], accelerator: Accelerator) -> None:
    """Raises UserError if the processes were not started with the same flags, or with the same code."""
    # What may be a machine's own. Files are compared by what they hold, and workers share out a stream.
    own = {'output', 'experiment', 'resume', 'threads', 'config', 'data_dir', 'dataset', 'initial_checkpoint',
           *([] if flags['streaming'] else ['workers'])}
    same = {'the file of --initial-checkpoint' if key == 'initial_sha256' else f'--{key.replace("_", "-")}': value
            for key, value in flags.items() if key not in own}
    packages = {key: version for key, version in versions().items() if key != 'python'}
    check_same(accelerator, {**same, **packages, "timm-sd's code": code_digest()})


def main() -> None:
    """Parses, checks everything, and only then makes the run folder and trains."""
    args = parse_train_flags()
    registered_name(args.model)
    args.pretrained = args.pretrained and not args.initial_checkpoint  # which says all weights
    args.amp, args.amp_dtype = settle_precision(args.amp, args.amp_dtype)
    accelerator = join_processes(make_settings(LaunchSettings, args), args.grad_accum_steps)
    args.initial_sha256 = digest_of(args.initial_checkpoint)  # recorded: a resumed run began with the same weights
    check_ranks(vars(args), accelerator)
    from_main_process(accelerator, lambda: check_trackers(make_settings(TrackingSettings, args)))
    args.global_batch_size = args.batch_size * accelerator.num_processes  # recorded: order and gates follow from it
    flags = group_flags(args)
    trainer = build_trainer(flags, accelerator)
    results = from_main_process(accelerator, trainer.folder.read_results)
    if results is None:
        if accelerator.is_main_process:
            print(header(trainer, flags), file=sys.stderr, flush=True)
        start_trackers(flags.tracking, accelerator, trainer.folder.path,
                       public_flags(flags.record, trainer.data.record['data']))
        trainer.train(resume=from_main_process(accelerator, lambda: flags.folder.resume is not None))
        results = finish(trainer, flags)
    if accelerator.is_main_process:
        print(closing_lines(trainer.folder, results), file=sys.stderr)
        if not sys.stdout.isatty():  # for scripts; a person has results.json
            print(json.dumps(dict(run_folder=str(trainer.folder.path), **results)))
    accelerator.end_training()


if __name__ == '__main__':
    is_resumed = any(word.startswith('--resume') for word in sys.argv)
    run_script(main, go_on='run the same line again' if is_resumed else 'run the same line with --resume auto')

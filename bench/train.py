"""Trains a network with stochastic depth: accelerate launch bench/train.py -c RECIPE [timm's flags].

Without arguments it runs the recipe `quickstart`, on data that scikit-learn ships, in under a minute.
"""
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn
from tqdm import tqdm

import timm_sd
from batches import Batches
from config import UserError, changed_from_recipe, check_model_name, cores, parse, run, train_parser, user_errors
from engine import Autocast, autocast, default_amp, evaluate, train_epoch
from figures import save_curves
from parts import load_parts, make_batches
from run_folder import RunFolder, find_run_folder, hardware, load_raw_state, raw_state, versions
from timm_sd.convert import drop_path_slots


def build_model(args: Any, num_classes: int) -> Any:
    """The network of the flags; UserError if one doesn't suit it."""
    flags = dict(schedule=args.drop_path_schedule, mode=args.drop_path_mode, scale=args.drop_path_scale)
    choices = {key: value for key, value in flags.items() if value is not None}
    adds = not check_model_name(args.model).startswith('sd_')  # the method is no part of timm's own networks
    kwargs: dict[str, Any] = {} if adds else {f'drop_path_{key}': value for key, value in choices.items()}
    if args.drop_path is not None and not adds:
        kwargs['drop_path_rate'] = args.drop_path
    if not adds:
        kwargs['drop_path_seed'] = args.seed
    with user_errors(f'--model {args.model}'):
        model: Any = timm.create_model(args.model, pretrained=args.pretrained, num_classes=num_classes,
                                       **kwargs, **args.model_kwargs)
        if adds and args.drop_path:
            timm_sd.add_stochastic_depth(model, args.drop_path, **choices, seed=args.seed)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
        if args.compile == 'model':
            model.compile(mode=args.torchcompile_mode)
        elif args.compile == 'blocks':
            timm_sd.compile_blocks(model, mode=args.torchcompile_mode)
    return model


def build_optimizer(args: Any, model: nn.Module, updates_per_epoch: int) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimiser and schedule of the flags; UserError if one is unknown."""
    # torch's own optimisers in one kernel: of 110 layers' 330 tensors the plain loop takes twice as long
    fused: dict[str, Any] = dict(fused=True) if args.opt in ('sgd', 'momentum', 'adam', 'adamw') else {}
    with user_errors(f'--opt {args.opt}, --sched {args.sched}'):
        optimizer = create_optimizer_v2(
            model, opt=args.opt, lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay,
            filter_bias_and_bn=args.filter_bias_and_bn, **fused)
        scheduler, _ = create_scheduler_v2(optimizer, updates_per_epoch=updates_per_epoch, **scheduler_kwargs(args))
    if args.warmup_constant:  # timm's warm-up always climbs
        scheduler.warmup_steps = [0.] * len(optimizer.param_groups)
    return optimizer, scheduler


class Run(NamedTuple):
    """What a training works with."""
    args: Any
    accelerator: Accelerator
    amp: Autocast
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    batches: dict[str, Batches]
    class_names: list[str]
    folder: RunFolder


def last_rate(job: Run) -> float:
    """1 - p_L of the network."""
    return getattr(job.model, 'drop_path_rate', job.args.drop_path or 0.)


def processes(accelerator: Accelerator) -> str:
    """How many processes train together, for the header; it says so if a launcher started more than that."""
    together, started = accelerator.num_processes, int(os.environ.get('WORLD_SIZE', '1'))
    strangers = f' (of {started} started, unrelated: see README, Several processes)' if started > together else ''
    return f'{together} process{"es" if together > 1 else ""}{strangers}'


def header(job: Run) -> str:
    """One line: device, precision, processes, network, data, gates."""
    args, device = job.args, job.accelerator.device
    dtype = 'bf16' if args.amp else 'fp32'
    layout = ', channels_last' if args.channels_last else ''
    compiled = f' (compiled {args.compile})' if args.compile else ''
    sizes = '/'.join(str(batches.images) for batches in job.batches.values())
    gates = timm_sd.depth_gates(job.model)
    rate = last_rate(job)
    depth = 'constant depth' if rate == 0 else f"p_L {1 - rate:g}, timm's DropPath" if gates is None else (
        f'p_L {1 - rate:g}, expected depth {gates.expected_depth:.1f} of {len(gates.open)} blocks')
    return (f'{device} ({torch.get_num_threads()} threads), {dtype}{layout} | '
            f'{processes(job.accelerator)} x batch {args.batch_size} | {args.model}{compiled} | '
            f'{args.data_dir or args.dataset} {sizes} train/val/test | {depth} | {job.folder.path}')


def restore(job: Run) -> dict[str, Any]:
    """Goes back to the last checkpoint, or to the beginning; returns what is known of the epochs so far."""
    state: dict[str, Any] = dict(epoch=0, best_epoch=0, best_top1=-1., rows=[], hardware=[])
    checkpoint = job.folder.load_checkpoint() if job.args.resume else None
    if checkpoint is not None:
        state = {key: checkpoint[key] for key in state}
        load_raw_state(job.model, checkpoint['raw_model'])
        job.optimizer.load_state_dict(checkpoint['optimizer'])
    # the schedule follows from the epoch alone
    job.scheduler.step(state['epoch'])
    job.scheduler.step_update(state['epoch'] * len(job.batches['train']))
    return state


def first_branch_weight(model: nn.Module) -> nn.Parameter:
    """The first convolution (or linear layer) of the first residual block, whose gradients the paper's Fig. 7 shows."""
    blocks = (module for module in model.modules() if drop_path_slots(module))
    weight = next((param for block in blocks for param in block.parameters() if param.ndim > 1), None)
    if weight is None:
        raise UserError(f'--log-gradients: {type(model).__name__} has no residual block with a drop_path')
    return weight


def train(job: Run) -> dict[str, Any]:
    """Trains all epochs that a checkpoint doesn't hold already; returns the rows of summary.csv and the best epoch."""
    args, accelerator, folder, scheduler = job.args, job.accelerator, job.folder, job.scheduler
    batches, gates = job.batches['train'], timm_sd.depth_gates(job.model)
    state = restore(job)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.remove_after(state['epoch'])
    model, optimizer = accelerator.prepare(job.model, job.optimizer)
    watched = first_branch_weight(job.model) if args.log_gradients else None

    # of this epoch: mean absolute gradient of each update, seconds of each validation within it
    magnitudes: list[torch.Tensor] = []
    pauses: list[float] = []

    def select() -> dict[str, float]:
        """Evaluates on the validation images; keeps the weights if they are the best so far."""
        epoch = state['epoch']
        val = evaluate(job.model, job.batches['val'], accelerator, job.amp)
        # validation images that are the test's select nothing: the last epoch counts
        if val['top1'] > state['best_top1'] or args.val_split == args.test_split:
            state.update(best_epoch=epoch, best_top1=val['top1'])
            if accelerator.is_main_process:
                folder.save_best(job.model.state_dict(), epoch)
        return val

    def before_update(step: int) -> None:
        if watched is not None and watched.grad is not None:
            magnitudes.append(watched.grad.abs().mean())
        update = step // args.grad_accum_steps
        if args.eval_interval and update and update % args.eval_interval == 0:
            start = time.perf_counter()
            select()
            model.train()
            pauses.append(time.perf_counter() - start)

    with tqdm(total=args.epochs * batches.images, initial=state['epoch'] * batches.images, unit=' images',
              mininterval=1. if sys.stderr.isatty() else 60., disable=not accelerator.is_main_process) as bar:
        for epoch in range(state['epoch'], args.epochs):
            bar.set_description(f'epoch {epoch + 1}/{args.epochs}', refresh=False)
            batches.set_epoch(epoch)
            # the masks of DropPath and dropout: each rank has its own, and a resumed run those of a whole one
            torch.manual_seed(random.Random(f'{args.seed}/{epoch}/{accelerator.process_index}').getrandbits(63))
            if gates is not None:
                gates.set_epoch(epoch)
            lr, start = optimizer.param_groups[0]['lr'], time.perf_counter()
            magnitudes.clear()
            pauses.clear()
            train_loss = train_epoch(model, batches, optimizer, scheduler, accelerator, job.amp, epoch, bar,
                                     args.smoothing, args.grad_accum_steps, args.log_interval, before_update)
            seconds = time.perf_counter() - start - sum(pauses)
            if not math.isfinite(train_loss):
                raise UserError(f'the loss of epoch {epoch + 1} is {train_loss}; lower --lr {args.lr}')
            val = select()
            scheduler.step(epoch + 1)
            row = dict(epoch=epoch, train_loss=train_loss, eval_loss=val['loss'], eval_top1=val['top1'],
                       eval_top5=val['top5'], lr=lr, train_seconds=seconds)
            if magnitudes:
                row['grad_magnitude'] = torch.stack(magnitudes).mean().item()
            state['rows'].append(row)
            state['hardware'].append(hardware(accelerator, args.amp))
            state['epoch'] = epoch + 1
            if accelerator.is_main_process:
                folder.save_checkpoint(dict(
                    state, raw_model=raw_state(job.model), optimizer=optimizer.state_dict()), args.checkpoint_hist)
                folder.write_summary(state['rows'])
                bar.write(f'epoch {epoch + 1:3d}: train_loss {train_loss:.4f}, eval_loss {val["loss"]:.4f}, '
                          f'eval_top1 {val["top1"]:.2f}, lr {lr:.4g}, {batches.images / seconds:.0f} images/s',
                          file=sys.stderr)
    return state


def test(job: Run, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Test loss and errors of these weights, in fp32: that is what validate.py, and timm's, find anywhere."""
    job.model.load_state_dict(weights)
    metrics = evaluate(job.model, job.batches['test'], job.accelerator, autocast(job.accelerator.device, False))
    errors = {f'{key}_err': round(100 - metrics[key], 4) for key in ('top1', 'top5')}
    return dict(loss=metrics['loss'], **errors)


def finish(job: Run, state: dict[str, Any]) -> dict[str, Any]:
    """Tests the best and the last epoch's weights, and writes results.json, model.safetensors and curves.png."""
    args, folder, gates, rows = job.args, job.folder, timm_sd.depth_gates(job.model), state['rows']
    images = {name: batches.images for name, batches in job.batches.items()}
    # a folder of other classes than the recipe's data set is no copy of it
    cfg: Any = job.model.pretrained_cfg
    is_copy = not args.data_dir or len(job.class_names) == cfg['num_classes']
    dataset = args.dataset if is_copy else Path(args.data_dir).name
    last = test(job, job.model.state_dict())
    weights = folder.load_best(state['best_epoch'])
    best = test(job, weights)
    # a run may have gone on elsewhere: the time is that of the epochs trained where the last one was, and the median is
    # robust to a machine's other work
    *_, place = state['hardware']
    epoch_seconds = statistics.median(
        row['train_seconds'] for row, where in zip(rows, state['hardware'], strict=True) if where == place)
    origin = dict(
        model=args.model, recipe=Path(args.config).stem, changed_from_recipe=changed_from_recipe(vars(args)),
        seed=args.seed, epochs=args.epochs, dataset=dataset, images=images,
        held_out='nothing: the last epoch counts' if args.val_split == args.test_split else
                 'validation split' if args.val_split else f'{args.val_per_class} of each class')
    results = dict(
        origin, label_names=job.class_names,
        param_count=sum(p.numel() for p in job.model.parameters()),
        drop_path_rate=last_rate(job),
        expected_depth=gates.expected_depth if gates else None, blocks=len(gates.open) if gates else None,
        best_epoch=state['best_epoch'], val_top1_err=round(100 - state['best_top1'], 4),
        val_top1_err_last=round(100 - rows[-1]['eval_top1'], 4), test_best=best, test_last=last,
        epoch_seconds=round(epoch_seconds, 2), images_per_second=round(images['train'] / epoch_seconds, 1),
        hardware=place, versions=versions(), args=vars(args))
    if job.accelerator.is_main_process:
        folder.write_summary(rows)
        folder.write_weights(weights, dict(
            origin, img_size=args.img_size, mean=args.mean, std=args.std, selected_epoch=state['best_epoch'],
            test_top1_err=best['top1_err'],
            test_top1_err_last_epoch=last['top1_err'], timm_sd=timm_sd.__version__))
        save_curves(rows, results, folder.path / 'curves.png')
        folder.write_results(results)  # last: it says that the run is complete
    return results


def open_folder(args: Any, accelerator: Accelerator, name: str) -> RunFolder:
    """Finds the run folder on the main process, makes it, and tells the others: the clock is in its name."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [find_run_folder(vars(args), name)]
            found[0].create(vars(args))
            found[0].lock()
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def main() -> None:
    """Parses, checks everything, and only then makes the run folder and trains."""
    args = parse(train_parser())
    check_model_name(args.model)
    accelerator = Accelerator(mixed_precision='no', dynamo_backend='no')  # the flags say it, not accelerate's config
    if args.require_processes not in (None, accelerator.num_processes):
        raise UserError(f'--require-processes is {args.require_processes}, but here train {processes(accelerator)}; '
                        'README, Several processes, has the launch lines')
    device = accelerator.device
    # accelerate launch says OMP_NUM_THREADS=1 to a process that has the machine to itself
    torch.set_num_threads(args.threads or max(1, cores() // int(os.environ.get('LOCAL_WORLD_SIZE', '1'))))
    torch.backends.cudnn.benchmark = True  # all batches but the last have one shape
    args.amp = default_amp(device.type) if args.amp is None else args.amp
    args.global_batch_size = args.batch_size * accelerator.num_processes
    torch.manual_seed(args.seed)
    parts = load_parts(args, accelerator.is_main_process and sys.stderr.isatty())
    class_names = parts['train'].class_names
    model = build_model(args, len(class_names)).to(device)
    if args.log_gradients:
        first_branch_weight(model)  # if there is none, say so before anything is written
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    batches = {name: make_batches(args, part, model.pretrained_cfg, accelerator, train=name == 'train')
               for name, part in parts.items()}
    optimizer, scheduler = build_optimizer(args, model, len(batches['train']))

    folder = open_folder(args, accelerator, f'{args.model}-{args.img_size or model.pretrained_cfg["input_size"][-1]}')
    job = Run(args, accelerator, autocast(device, args.amp), model, optimizer, scheduler, batches, class_names, folder)
    results = folder.read_results()
    if results is None:
        if accelerator.is_main_process:
            print(header(job), file=sys.stderr, flush=True)
        results = finish(job, train(job))
    if accelerator.is_main_process:
        print(json.dumps(dict(run_folder=str(folder.path), **results)))
    accelerator.end_training()


if __name__ == '__main__':
    run(main)

"""Evaluates a registered model or a checkpoint: python bench/validate.py --model NAME --pretrained --dataset DATA.

timm's conventions: fp32 unless --amp, mean and std of the model's pretrained_cfg, one JSON on stdout, a results CSV.
"""
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import safetensors
import timm
from accelerate import Accelerator

from config import UserError, check_model_name, parse, run, set_hub_quiet, validate_parser
from data import Batches, load_image_set
from engine import autocast, evaluate
from run_folder import write_atomic


def model_of(checkpoint: Path) -> str:
    """The model's name in a checkpoint's metadata, as train.py writes it."""
    try:
        with safetensors.safe_open(checkpoint, 'pt') as file:
            name = (file.metadata() or {}).get('model')
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'--checkpoint {checkpoint} can not be read as safetensors: {error}') from error
    if name is None:
        raise UserError(f'--checkpoint {checkpoint} does not say which model it is; give --model')
    return name


def load_model(args: Any, num_classes: int) -> Any:
    """The network with its weights.

    Raises:
        UserError: If there are no such weights, or they are those of another network.
    """
    check_model_name(args.model)
    try:
        return timm.create_model(args.model, pretrained=args.pretrained, num_classes=num_classes,
                                 checkpoint_path=args.checkpoint or '', **args.model_kwargs)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        weights = f'--checkpoint {args.checkpoint}' if args.checkpoint else '--pretrained'
        reason = ' '.join(str(error).split())[:200]
        raise UserError(f'{weights} does not fit --model {args.model} with {num_classes} classes: {reason}') from error


def main() -> None:
    """Loads data and model, evaluates, prints and writes one row of results."""
    args = parse(validate_parser())
    set_hub_quiet()
    if args.checkpoint and args.model is None:
        args.model = model_of(Path(args.checkpoint))
    if args.model is None:
        raise UserError('neither --model nor --checkpoint is given')
    check_model_name(args.model)
    accelerator = Accelerator()
    data = load_image_set(args.data_dir or args.dataset, args.split, args.dataset_config, args.input_key,
                          args.target_key, args.img_size, accelerator.is_main_process and sys.stderr.isatty())
    if args.num_classes not in (None, len(data.class_names)):
        raise UserError(f'--num-classes is {args.num_classes}, but the data has {len(data.class_names)} classes')
    model = load_model(args, len(data.class_names)).to(accelerator.device)
    cfg = model.pretrained_cfg
    size = data.images.shape[-1]
    if args.img_size is None and size != cfg['input_size'][-1]:
        raise UserError(f'images are {size} px, {args.model} wants {cfg["input_size"][-1]}; resize with --img-size')
    batches = Batches(data.to(accelerator.device), args.batch_size, args.mean or cfg['mean'], args.std or cfg['std'],
                      rank=accelerator.process_index, world_size=accelerator.num_processes)
    metrics = evaluate(model, batches, accelerator, autocast(accelerator.device, bool(args.amp)))
    row = dict(
        model=args.model, top1=round(metrics['top1'], 4), top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4), top5_err=round(100 - metrics['top5'], 4),
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 2), img_size=size,
        crop_pct=1.0, interpolation='none' if args.img_size is None else 'bilinear')
    if accelerator.is_main_process:
        if args.results_file:
            text = io.StringIO()
            writer = csv.DictWriter(text, fieldnames=list(row), lineterminator='\n')
            writer.writeheader()
            writer.writerow(row)
            write_atomic(Path(args.results_file), text.getvalue().encode())
        print(json.dumps(row))


if __name__ == '__main__':
    run(main)

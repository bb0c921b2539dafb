"""Evaluates a registered model or a checkpoint: python bench/validate.py --model NAME --pretrained --dataset DATA.

timm's conventions: fp32 unless --amp, mean and std of the model's pretrained_cfg, one JSON on stdout, a results CSV.
"""
import json
import sys
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from accelerate import Accelerator
from timm.data import resolve_data_config

from config import UserError, check_model_name, parse, run, user_errors, validate_parser
from engine import autocast, evaluate
from parts import check_classes, load_part, make_batches
from run_folder import write_csv


def take_from_metadata(args: Any) -> None:
    """Model, image size, mean and std, where no flag says them, as train.py writes them into a checkpoint."""
    try:
        with safetensors.safe_open(args.checkpoint, 'pt') as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        if args.model is not None:  # timm reads other files too
            return
        raise UserError(f'--checkpoint {args.checkpoint} can not be read as safetensors: {error}') from error
    if args.model is None and 'model' not in metadata:
        raise UserError(f'--checkpoint {args.checkpoint} does not say which model it is; give --model')
    args.model = args.model or metadata['model']
    for key in ('img_size', 'mean', 'std'):
        if getattr(args, key) is None:
            setattr(args, key, json.loads(metadata.get(key, 'null')))


def load_model(args: Any, num_classes: int) -> Any:
    """The network with its weights; UserError if there are none, or they are those of another network."""
    if args.checkpoint:
        what = f'--checkpoint {args.checkpoint} does not fit --model {args.model} with {num_classes} classes'
        if not Path(args.checkpoint).is_file():
            raise UserError(f'--checkpoint {args.checkpoint} is no file')
    else:
        what = f'pretrained weights of {args.model}'
    with user_errors(what):
        model: Any = timm.create_model(
            args.model, pretrained=not args.checkpoint, checkpoint_path=args.checkpoint,
            num_classes=num_classes if args.checkpoint else None, **args.model_kwargs)
    if model.num_classes != num_classes:  # timm would replace the classifier by a random one
        raise UserError(f'{args.model} knows {model.num_classes} classes, the data has {num_classes}; '
                        'choose the data with --dataset, --data-dir and --target-key')
    return model


def main() -> None:
    """Loads data and model, evaluates, prints and writes one row of results."""
    args = parse(validate_parser())
    if args.checkpoint:
        take_from_metadata(args)
    if args.model is None:
        raise UserError('neither --model nor --checkpoint is given')
    check_model_name(args.model)
    if args.results_file and not Path(args.results_file).parent.is_dir():
        raise UserError(f'--results-file {args.results_file}: there is no such folder')
    accelerator = Accelerator(mixed_precision='no', dynamo_backend='no')
    part = load_part(args, args.split, accelerator.is_main_process and sys.stderr.isatty())
    check_classes(args, len(part.class_names))
    model = load_model(args, len(part.class_names)).to(accelerator.device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    # timm's: registered weights at their test size; a checkpoint as train.py has tested it
    cfg = resolve_data_config(pretrained_cfg=model.pretrained_cfg, use_test_size=not args.checkpoint)
    batches = make_batches(args, part, cfg, accelerator)
    metrics = evaluate(model, batches, accelerator, autocast(accelerator.device, args.amp))
    row = dict(
        model=args.model, top1=round(metrics['top1'], 4), top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4), top5_err=round(100 - metrics['top5'], 4),
        param_count=round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        img_size=args.img_size or cfg['input_size'][-1], crop_pct=1.0 if args.in_memory else cfg['crop_pct'],
        interpolation=cfg['interpolation'] if not args.in_memory else 'bilinear' if args.img_size else 'none')
    if accelerator.is_main_process:
        if args.results_file:
            write_csv(Path(args.results_file), [row])
        print(json.dumps(row))


if __name__ == '__main__':
    run(main)

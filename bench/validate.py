"""Evaluates a registered model or a checkpoint: python bench/validate.py --model NAME --pretrained --dataset DATA.

timm's conventions: fp32 unless --amp, mean and std of the model's pretrained_cfg, one JSON on stdout, a results CSV.
"""
import harness.interrupts  # noqa: F401  (before the imports that take seconds)

# isort: split
import json
import math
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config

from harness.cli import Parser, add_flags, make_settings, run_script
from harness.data.columns import open_split, rename_classes
from harness.data.loaders import make_batches
from harness.data.settings import ImageSettings
from harness.data.sources import SourceSettings, open_data
from harness.data.splits import check_classes, load_images
from harness.engine import autocast, evaluate
from harness.errors import UserError, user_errors
from harness.files import file_to_replace, write_csv
from harness.launch import make_accelerator
from harness.launcher import settle_precision
from harness.network import NetworkSettings, check_loaded, check_size, local_source, registered_name, size_kwargs
from harness.run_folder import read_metadata
from timm_sd.weight_files import check_finite, check_weights


def validate_parser() -> Parser:
    """The flags of validate.py."""
    parser = Parser('Evaluates a registered model or a checkpoint.')
    add_flags(parser, SourceSettings, ImageSettings, NetworkSettings)
    parser.add_argument('--split', default='test', help='what is evaluated')
    parser.add_argument('--checkpoint', help='safetensors file, such as model.safetensors of a run folder')
    parser.add_argument('--results-file', help='CSV to write')
    # None: as the checkpoint says.
    parser.set_defaults(model=None, dataset='uoft-cs/cifar10', in_memory=None, model_kwargs=None)
    return parser


def read_settings(file: str) -> dict[str, Any]:
    """What train.py writes into a safetensors file of how its images look and what its classes are called.

    Empty for files of others.
    """
    metadata = read_metadata(file)
    found: dict[str, Any] = {key: json.loads(metadata[key]) for key in (
        'img_size', 'mean', 'std', 'in_memory', 'model_kwargs', 'label_names') if key in metadata}
    return dict(found, model=metadata['model']) if metadata else {}


def load_network(network: NetworkSettings, checkpoint: str | None, num_classes: int, img_size: int | None) -> Any:
    """The network with its weights; UserError if there are none, or they are those of another network or image size.

    Args:
        network: Which.
        checkpoint: File of its weights; without it they are the published ones.
        num_classes: Of the checkpoint.
        img_size: Side of the images in pixels, if not the network's.
    """
    name = registered_name(network.model)
    if checkpoint:
        what = f'--checkpoint {checkpoint} does not fit --model {network.model} with {num_classes} classes'
    else:
        what = f'pretrained weights of {network.model}'
    with user_errors(what):
        local, weights = local_source(network.model, pretrained=not checkpoint)
        if checkpoint and checkpoint.endswith('.safetensors'):
            cfg: Any = timm.get_pretrained_cfg(name)
            check_weights(checkpoint, dict(cfg.to_dict(), num_classes=num_classes, input_size=(network.channels,)))
        model: Any = timm.create_model(
            local, pretrained=not checkpoint, checkpoint_path=checkpoint,
            num_classes=num_classes if checkpoint else None, **weights,
            **dict(size_kwargs(name, img_size), **network.model_kwargs))
        if checkpoint:  # complete, or timm fails
            check_finite(model.state_dict().items())
        else:
            check_loaded(model)
    check_size(model, network, img_size)
    return model


def label_names(model: Any) -> list[str] | None:
    """The names of a published network's classes, from its config.json or its weights; None where they don't tell."""
    cfg = model.pretrained_cfg
    names = cfg.get('label_names') or read_settings(cfg.get('file') or '').get('label_names')
    return names if isinstance(names, list) else None


def main() -> None:
    """Loads data and model, evaluates, prints and writes one row of results."""
    flags, names = validate_parser().parse_args(), None
    if flags.checkpoint:
        if not Path(flags.checkpoint).is_file():
            raise UserError(f'--checkpoint {flags.checkpoint} is no file')
        metadata = read_settings(flags.checkpoint)
        names = metadata.pop('label_names', None)
        for key, value in metadata.items():
            if getattr(flags, key) is None:
                setattr(flags, key, value)
    if flags.model is None:
        raise UserError(f'--checkpoint {flags.checkpoint} is no safetensors file that names its model; give --model'
                        if flags.checkpoint else 'neither --model nor --checkpoint is given')
    registered_name(flags.model)
    if flags.results_file:
        file_to_replace(Path(flags.results_file), '--results-file')
    flags.in_memory = flags.in_memory is not False
    flags.model_kwargs = flags.model_kwargs or {}
    flags.amp, flags.amp_dtype = settle_precision(flags.amp, flags.amp_dtype)
    accelerator = make_accelerator()
    images, network = make_settings(ImageSettings, flags), make_settings(NetworkSettings, flags)
    source = make_settings(SourceSettings, flags)
    data = open_data(source, accelerator)
    split = open_split(data, source, flags.split)
    classes = len(split.class_names)
    check_classes(images, classes)
    model = load_network(network, flags.checkpoint, len(names or split.class_names),
                         images.img_size).to(accelerator.device)
    names = names or label_names(model)
    if names is not None:
        split = rename_classes(split, names, flags.checkpoint or flags.model)
    elif model.num_classes != classes:
        raise UserError(f'{network.model} knows {model.num_classes} classes, the data has {classes}; '
                        'choose the data with --dataset, --data-dir and --target-key')
    loaded = load_images(split, images, network.channels,
                         progress=accelerator.is_main_process and sys.stderr.isatty())
    if network.channels_last:
        model = model.to(memory_format=torch.channels_last)
    # As timm's script: registered weights are evaluated at their test size, a checkpoint at train.py's.
    cfg = resolve_data_config(pretrained_cfg=model.pretrained_cfg, use_test_size=not flags.checkpoint)
    batches = make_batches(loaded, images, cfg, accelerator, channels=network.channels)
    metrics = evaluate(model, batches, accelerator,
                       autocast(accelerator.device, bool(network.amp), dtype=flags.amp_dtype))
    if not math.isfinite(metrics['loss']):
        raise UserError(f'the outputs of {flags.checkpoint or flags.model} are not finite on {split.where}')
    row = dict(
        model=flags.model, top1=round(metrics['top1'], 4), top1_err=round(100 - metrics['top1'], 4),
        top5=round(metrics['top5'], 4), top5_err=round(100 - metrics['top5'], 4),
        param_count=round(sum(param.numel() for param in model.parameters()) / 1e6, 2),
        img_size=images.img_size or cfg['input_size'][-1], crop_pct=1.0 if images.in_memory else cfg['crop_pct'],
        interpolation=cfg['interpolation'] if not images.in_memory else 'bilinear' if images.img_size else 'none')
    if accelerator.is_main_process:
        if flags.results_file:
            write_csv(Path(flags.results_file), [row])
        print(json.dumps(row))


if __name__ == '__main__':
    run_script(main)

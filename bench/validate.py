"""Evaluates a registered model or a checkpoint: python bench/validate.py --model NAME --pretrained --dataset DATA.

timm's conventions: fp32 unless --amp, mean and std of the model's pretrained_cfg, one JSON on stdout, a results CSV.

    python bench/validate.py --checkpoint A/model.safetensors B/model.safetensors --blocks 9 8 7 6 --results-file d.csv

shortens each network to several depths, and writes d.csv, d.json and d.png: the error over the images a second.
"""
import harness.interrupts  # noqa: F401  (before the imports that take seconds)

# isort: split
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from timm.data import resolve_data_config

from harness.cli import Parser, add_flags, make_settings, run_script
from harness.data.batches import Batches
from harness.data.columns import open_split, rename_classes
from harness.data.loaders import make_batches
from harness.data.settings import HeldOutSettings, ImageSettings
from harness.data.sources import SourceSettings, open_data
from harness.data.splits import Images, check_classes, load_images
from harness.engine import autocast, evaluate
from harness.errors import UserError, user_errors
from harness.files import file_to_replace, write_csv, write_json
from harness.launch import make_accelerator
from harness.launcher import settle_precision
from harness.machine import hardware, versions
from harness.network import (
    NetworkSettings,
    check_loaded,
    check_size,
    digest_of,
    local_source,
    registered_name,
    size_kwargs,
)
from harness.plots import save_depths
from harness.run_folder import read_metadata
from timing.depths import (
    DepthsSettings,
    Pairs,
    check_depths,
    load_training_images,
    measure_depths,
    print_depths,
    some_of,
)
from timing.rows import flat
from timm_sd.download import WEIGHTS_FILE
from timm_sd.weight_files import check_finite, check_weights


def validate_parser() -> Parser:
    """The flags of validate.py."""
    parser = Parser('Evaluates a registered model or a checkpoint.')
    add_flags(parser, SourceSettings, ImageSettings, NetworkSettings)
    parser.add_argument('--split', default='test', help='what is evaluated')
    parser.add_argument('--checkpoint', nargs='+', help='safetensors file, such as model.safetensors of a run folder; '
                        'several with --blocks or --share')
    parser.add_argument('--results-file', help='CSV to write; with --blocks or --share JSON and PNG too')
    add_flags(parser, DepthsSettings, HeldOutSettings)
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


def take_settings(flags: Any) -> list[str] | None:
    """Fills the flags that weren't given with what the checkpoints say; returns the names of their classes.

    Raises:
        UserError: If there is no such file, it doesn't name its network, or two were trained on other images.
    """
    names, first = None, None
    for file in flags.checkpoint or ():
        if not Path(file).is_file():
            raise UserError(f'--checkpoint {file} is no file')
        metadata = read_settings(file)
        if first is not None and metadata != first:
            differing = sorted(key for key in {**first, **metadata} if first.get(key) != metadata.get(key))
            raise UserError(f'--checkpoint {file} has another {", ".join(differing)} than {flags.checkpoint[0]}; '
                            'evaluate it by itself')
        first = metadata
    for key, value in (first or {}).items():
        if key == 'label_names':
            names = value
        elif getattr(flags, key) is None:
            setattr(flags, key, value)
    if flags.model is None:
        raise UserError(f'--checkpoint {flags.checkpoint[0]} is no safetensors file that names its model; give --model'
                        if flags.checkpoint else 'neither --model nor --checkpoint is given')
    return names


def called(file: str) -> str:
    """What a checkpoint is called: as its run folder, or the file."""
    path = Path(file).resolve()
    return path.parent.name if path.name == WEIGHTS_FILE else path.stem


@dataclass
class Evaluation:
    """How networks are evaluated.

    Attributes:
        images: How images are looked at.
        network: See `NetworkSettings`.
        cfg: The data config of timm: image size, mean and std, crop.
        accelerator: Says who we are among the processes.
        split: What is evaluated.
        where: Where that came from.
        amp_dtype: Of autocast.
    """
    images: ImageSettings
    network: NetworkSettings
    cfg: dict[str, Any]
    accelerator: Accelerator
    split: Images
    where: str
    amp_dtype: str

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.images.img_size or self.cfg['input_size'][-1]

    def batches(self, split: Images) -> Batches:
        return make_batches(split, self.images, self.cfg, self.accelerator, channels=self.network.channels)

    def row(self, model: Any) -> dict[str, Any]:
        """timm's columns of results; UserError if the network's outputs aren't finite."""
        metrics = evaluate(model, self.batches(self.split), self.accelerator,
                           autocast(self.accelerator.device, bool(self.network.amp), dtype=self.amp_dtype))
        if not math.isfinite(metrics['loss']):
            raise UserError(f'the outputs of {self.network.model} are not finite on {self.where}')
        in_memory, cfg = self.images.in_memory, self.cfg
        return dict(
            model=self.network.model, top1=round(metrics['top1'], 4), top1_err=round(100 - metrics['top1'], 4),
            top5=round(metrics['top5'], 4), top5_err=round(100 - metrics['top5'], 4),
            param_count=round(sum(param.numel() for param in model.parameters()) / 1e6, 2), img_size=self.size,
            crop_pct=1.0 if in_memory else cfg['crop_pct'],
            interpolation=cfg['interpolation'] if not in_memory else 'bilinear' if self.images.img_size else 'none')


def evaluate_depths(evaluation: Evaluation, models: dict[str, Any], flags: Any, depths: DepthsSettings,
                    names: list[str] | None) -> dict[str, Any]:
    """Each network at each depth; see `measure_depths`."""
    files = flags.checkpoint or [model.pretrained_cfg.get('file') for model in models.values()]
    digests = {name: digest_of(file, '--checkpoint') for name, file in zip(models, files, strict=True)}
    held_out = bn_batches = None
    if depths.order == 'measured' or depths.bn_images:
        found = load_training_images(make_settings(SourceSettings, flags), make_settings(HeldOutSettings, flags),
                                     flags.split, evaluation.images, evaluation.accelerator,
                                     evaluation.network.channels, names, flags.checkpoint or ())
        if depths.order == 'measured':
            held_out = Pairs(evaluation.batches(found.images['val']))
        if depths.bn_images:
            bn_batches = Pairs(evaluation.batches(some_of(found.images['train'], depths.bn_images)))
    rows = measure_depths(models, depths, evaluation.row, held_out, bn_batches,
                          (flags.batch_size, evaluation.network.channels, evaluation.size, evaluation.size),
                          bool(flags.amp))
    return dict(rows=rows, weights_sha256=digests, split=flags.split, order=depths.order, bn_images=depths.bn_images,
                batch_size=flags.batch_size, versions=versions(),
                hardware=hardware(evaluation.accelerator, bool(flags.amp), flags.amp_dtype))


def main() -> None:
    """Loads data and networks, evaluates, prints and writes a row of results, or one for each depth."""
    flags = validate_parser().parse_args()
    names, depths = take_settings(flags), make_settings(DepthsSettings, flags)
    registered_name(flags.model)
    check_depths(vars(flags))
    table = Path(flags.results_file) if flags.results_file else None
    if table:
        for suffix in ('.json', '.png') if depths.depths else ():
            file_to_replace(table.with_suffix(suffix), '--results-file')
        file_to_replace(table, '--results-file')
    flags.in_memory = flags.in_memory is not False
    flags.model_kwargs = flags.model_kwargs or {}
    flags.amp, flags.amp_dtype = settle_precision(flags.amp, flags.amp_dtype)
    accelerator = make_accelerator()
    if depths.depths and accelerator.num_processes > 1:
        raise UserError(f'--blocks and --share time one process, not {accelerator.num_processes}')
    images, network = make_settings(ImageSettings, flags), make_settings(NetworkSettings, flags)
    source = make_settings(SourceSettings, flags)
    split = open_split(open_data(source, accelerator), source, flags.split)
    classes = len(split.class_names)
    check_classes(images, classes)
    if len({called(file) for file in flags.checkpoint or ()}) < len(flags.checkpoint or ()):
        raise UserError(f'--checkpoint {" ".join(flags.checkpoint)}: two are called {called(flags.checkpoint[-1])!r}; '
                        'give their run folders other names')
    models = {called(file) if file else flags.model: load_network(
        network, file, len(names or split.class_names), images.img_size).to(accelerator.device)
        for file in flags.checkpoint or [None]}
    model = next(iter(models.values()))
    names = names or label_names(model)
    if names is not None:
        split = rename_classes(split, names, (flags.checkpoint or [flags.model])[0])
    elif model.num_classes != classes:
        raise UserError(f'{network.model} knows {model.num_classes} classes, the data has {classes}; '
                        'choose the data with --dataset, --data-dir and --target-key')
    loaded = load_images(split, images, network.channels,
                         progress=accelerator.is_main_process and sys.stderr.isatty())
    if network.channels_last:
        for each in models.values():
            each.to(memory_format=torch.channels_last)
    # As timm's script: registered weights are evaluated at their test size, a checkpoint at train.py's.
    cfg = resolve_data_config(pretrained_cfg=model.pretrained_cfg, use_test_size=not flags.checkpoint)
    evaluation = Evaluation(images, network, cfg, accelerator, loaded, split.where, flags.amp_dtype)
    if depths.depths:
        found = evaluate_depths(evaluation, models, flags, depths, names)
        print_depths(found['rows'])
        rows = [flat({key: value for key, value in row.items() if key != 'removed'}) for row in found['rows']]
        if table:
            write_json(table.with_suffix('.json'), found)
            save_depths(found['rows'], table.with_suffix('.png'))
    else:
        found = evaluation.row(model)
        rows = [found]
    if accelerator.is_main_process:
        if table:
            write_csv(table, rows)
        print(json.dumps(found))


if __name__ == '__main__':
    run_script(main)

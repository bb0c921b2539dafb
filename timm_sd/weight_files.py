"""What a file of weights is asked before a network is built for it: its checksum, its shapes, and whether it is finite.

timm asks none of this. It builds whatever config.json asks for, and loads NaN, or the bit patterns of integers.
"""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors import SafetensorError, safe_open
from timm.models._hub import load_model_config_from_path
from torch import nn

# The buffers that networks keep as integers: batch norm's count, and tables of positions.
INTEGERS = ('num_batches_tracked', 'index', 'idx', 'idxs')


class WeightsError(ValueError):
    """A file of weights that can't be used; the text names the tensor, in one line."""


def checksum(path: str, like: str) -> str:
    """A file's checksum of the kind that the Hub names it by.

    Args:
        path: The file.
        like: Such a checksum: the SHA-256 of a large file, 64 digits, or git's of a small one, 40 digits.
    """
    with open(path, 'rb') as file:
        return sha_fileobj(file).hex() if len(like) == 64 else git_hash(file.read())


def check_weights(path: str, cfg: dict[str, Any]) -> None:
    """Raises WeightsError unless a file's tensors are finite numbers of the shapes that a cfg says.

    What needs no tensor is asked first: num_classes of 10^7 would make a network of gigabytes.

    Args:
        path: A safetensors file.
        cfg: A pretrained_cfg: `classifier` and `first_conv` name layers, `num_classes` and `input_size` their sizes. A
            name that isn't in the file is passed over: timm renames the layers of some old files.

    Raises:
        WeightsError: Names the tensor.
    """
    try:
        with safe_open(path, 'pt') as file:
            names = file.keys()
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if not dtype.startswith(('F', 'BF')) and not name.endswith(INTEGERS):
                    raise WeightsError(f'{name} holds {dtype}, no floating-point numbers')
            _check_shapes(shapes, cfg)
            check_finite((name, file.get_tensor(name)) for name in names)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f'it is no whole safetensors file ({error})') from error


def stored_cfg(folder: Path, registered: dict[str, Any]) -> dict[str, Any]:
    """What the config.json of a folder says of the sizes of its weights, for `check_weights`.

    timm builds by `model_args`, and discards a classifier without a word where the cfg has another number of classes.

    Args:
        folder: Holds config.json.
        registered: The pretrained_cfg of its architecture, which names the layers.

    Raises:
        WeightsError: If the file can't be read, or names two numbers of classes.
    """
    try:
        cfg, _, args = load_model_config_from_path(folder)
        classes = cfg.get('num_classes', registered.get('num_classes'))
        built = args.get('num_classes', classes)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, LookupError) as error:
        raise WeightsError(f'config.json can not be read ({type(error).__name__}: {error})') from error
    if built != classes:
        raise WeightsError(f'num_classes of config.json is {classes}, and that of its model_args is {built}')
    return dict(registered, label_offset=cfg.get('label_offset'), num_classes=classes,
                input_size=cfg.get('input_size'))


def check_complete(path: str, model: nn.Module, cfg: dict[str, Any], renamed: bool = False) -> None:
    """Raises WeightsError unless a file has each tensor of a network, but those of its classifier.

    Where timm discards a classifier it loads the rest in part too, and says nothing.

    Args:
        path: A safetensors file that was loaded.
        model: The network, or its feature maps.
        cfg: Its pretrained_cfg: `classifier` names layers.
        renamed: A file that has other names too is passed over: timm renames the layers of some old files.
    """
    with safe_open(path, 'pt') as file:
        stored = set(file.keys())
    heads = tuple(f'{layer}.' for layer in _names(cfg.get('classifier')))
    wanted = {name.removeprefix('model.') for name in model.state_dict()}
    missing = sorted(name for name in wanted - stored if not name.startswith(heads))
    others = [name for name in stored - wanted if not name.startswith(heads)]
    if missing and not (renamed and others):
        raise WeightsError(f'it has no {missing[0]}{f", and {len(missing) - 1} more" if missing[1:] else ""}')


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises WeightsError that names the first tensor with a number that isn't finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.float().isfinite().all():  # not all kinds of 8 bits have isfinite
            raise WeightsError(f'{name} holds numbers that are not finite')


def _check_shapes(shapes: dict[str, list[int]], cfg: dict[str, Any]) -> None:
    if 'num_classes' in cfg:
        classes, offset = cfg['num_classes'], cfg.get('label_offset') or 0
        if type(classes) is not int or type(offset) is not int:
            raise WeightsError(f'num_classes is {classes!r}, label_offset {offset!r}: no numbers of classes')
        for layer in _names(cfg.get('classifier')):
            shape = shapes.get(f'{layer}.weight')
            if shape and shape[0] != classes + offset:
                raise WeightsError(f'{layer}.weight has {shape[0]} classes, and num_classes is {classes + offset}')
    channels = (cfg.get('input_size') or (3,))[0]
    for layer in _names(cfg.get('first_conv')):
        shape = shapes.get(f'{layer}.weight')
        # a multiple where the stem first folds pixels into channels
        if shape and len(shape) == 4 and (type(channels) is not int or channels < 1 or shape[1] % channels):
            raise WeightsError(f'{layer}.weight takes {shape[1]} channels, and in_chans is {channels!r}')


def _names(layers: Any) -> tuple[str, ...]:
    return (layers,) if isinstance(layers, str) else tuple(layers or ())

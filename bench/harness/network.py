"""The network that the flags name, with stochastic depth added where it is one of timm's own."""
import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.models import load_checkpoint, parse_model_name
from timm.models._hub import load_model_config_from_path
from torch import nn

import timm_sd
from harness.cli import KEY_VALUES, drop_rate, flag, positive_int
from harness.errors import UserError, nearest, user_errors
from harness.run_folder import read_metadata
from timm_sd.download import WEIGHTS_FILE, download
from timm_sd.probe import drop_path_slots
from timm_sd.rates import RateOverTime
from timm_sd.weight_files import check_complete, check_finite, check_weights, checksum, stored_cfg


@dataclass(frozen=True)
class NetworkSettings:
    """Network."""
    model: str = flag('sd_resnet110_cifar', "timm's name of the network")
    pretrained: bool = flag(False, 'start from the published weights')
    model_kwargs: dict[str, Any] = flag({}, "more arguments of timm's create_model", **KEY_VALUES)
    amp: bool | None = flag(None, 'autocast; None: as the run was begun, or if faster',
                            action=argparse.BooleanOptionalAction)
    amp_dtype: str | None = flag(None, "of autocast (default: bfloat16, or the launcher's)",
                                 choices=('bfloat16', 'float16'))
    channels_last: bool = flag(True, 'use the channels_last memory layout')

    @property
    def channels(self) -> int:
        """Of its images: 3, or what --model-kwargs in_chans=... says.

        Raises:
            UserError: If pictures can't have so many.
        """
        channels = self.model_kwargs.get('in_chans', 3)
        if channels not in (1, 3):
            raise UserError(f'--model-kwargs in_chans={channels}: pictures have 3 channels, or as grey ones 1')
        return channels


@dataclass(frozen=True)
class DepthSettings:
    """Stochastic depth, and the network in training."""
    drop_path: float | None = flag(None, "1 - p_L (default: the model's)", type=drop_rate)
    drop_path_schedule: str | None = flag(None, "of p_l over the blocks (default: the model's)",
                                          choices=timm_sd.SCHEDULES)
    drop_path_mode: str | None = flag(None, "what one gate drops (default: the model's)", choices=timm_sd.MODES)
    drop_path_scale: str | None = flag(None, "of the branch: eval is the paper's, train is timm's (default: the "
                                       "model's)", choices=timm_sd.SCALES)
    drop_path_when: str = flag('standard', 'epochs in which blocks drop: all, or those before --drop-path-cutoff '
                               '(early), or from there on (late)', choices=timm_sd.WHEN)
    drop_path_change: str = flag('constant', 'how the rate changes in them: not, or in a straight line down to 0 at '
                                 'the cutoff (early), up to --drop-path in the last epoch (late, standard)',
                                 choices=timm_sd.CHANGES)
    drop_path_cutoff: int | None = flag(None, 'epoch, counted from 0, at which dropping ends (early) or begins (late)',
                                        type=positive_int, metavar='EPOCH')
    initial_checkpoint: str | None = flag(None, 'file of weights to start from, such as model.safetensors of a run')
    drop: float | None = flag(None, 'dropout in front of the classifier', type=drop_rate)
    sync_bn: bool = flag(False, 'batch norm over all processes, on GPUs')
    grad_checkpointing: bool = flag(False, 'recompute activations to save memory')
    compile: str | None = flag(None, "torch.compile: 'blocks' compiles each residual branch and leaves the gates "
                                     'outside', choices=('blocks', 'model'))
    torchcompile_mode: str | None = flag(None, 'of torch.compile, such as reduce-overhead (CUDA graphs)',
                                         needs='compile')


def local_source(name: str, pretrained: bool) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which `timm.create_model` loads local files, which were downloaded and checked.

    timm by itself asks a silent Hub for minutes, compares no checksum, and builds what config.json asks for. It is left
    alone with weights of its own that are no model.safetensors of the Hub.

    Args:
        name: Such as 'resnet18', 'hf-hub:ORG/NAME@REVISION' or 'local-dir:FOLDER'.
        pretrained: With weights, which are downloaded if need be.

    Raises:
        OSError: If a file can't be had from the Hub.
        WeightsError: If the weights can't be used.
    """
    source, place = parse_model_name(name)
    if source == 'hf-hub':
        folder = Path(download(name, place, file='config.json')).parent
        if pretrained:
            download(name, f'{place.partition("@")[0]}@{folder.name}')  # of the same commit: into the same folder
        source, place = 'local-dir', str(folder)
    if source:
        weights = Path(place, WEIGHTS_FILE)
        architecture = load_model_config_from_path(place)[1]
        if pretrained and weights.exists() and not is_ours(architecture):
            cfg: Any = timm.get_pretrained_cfg(architecture)
            check_weights(str(weights), stored_cfg(Path(place), cfg.to_dict()))
        return f'{source}:{place}', {}
    cfg = timm.get_pretrained_cfg(name)
    if not pretrained or is_ours(name) or cfg is None or not cfg.hf_hub_id or cfg.hf_hub_filename or cfg.custom_load:
        return name, {}
    path = download(name, cfg.hf_hub_id)
    check_weights(path, cfg.to_dict())
    return name, dict(pretrained_cfg_overlay=dict(file=path))


def is_ours(architecture: str) -> bool:
    """Whether it is a network of this package: it checks its weights by itself, and takes the method as arguments."""
    return architecture.startswith('sd_')


def check_loaded(model: Any) -> None:
    """Raises WeightsError unless all weights of a pretrained network came, as finite numbers."""
    place = Path(model.pretrained_cfg.get('file') or 'none')
    weights = place / WEIGHTS_FILE if place.is_dir() else place
    if weights.suffix == '.safetensors' and weights.exists():
        check_complete(str(weights), model, model.pretrained_cfg, renamed=True)
    check_finite(model.state_dict().items())  # whatever they were read from


def registered_name(name: str) -> str:
    """The registered name that timm's `name` means; that of a Hub repository or a folder stands in its config.json.

    Raises:
        UserError: If there is none, with the nearest names.
    """
    with user_errors(f'--model {name}'):
        source, place = parse_model_name(local_source(name, pretrained=False)[0])
        found = load_model_config_from_path(place)[1] if source else name
        if not isinstance(found, str):
            raise UserError(f'--model {name}: its config.json names no architecture')
    if not timm.is_model(found):
        raise UserError(
            f'no model {found!r}; nearest: {nearest(found, timm.list_models() + timm.list_models("sd_*"))}')
    return found


def size_kwargs(name: str, img_size: int | None) -> dict[str, Any]:
    """What tells a network the side of its images in pixels: an argument, where it is built for one size.

    Args:
        name: The registered name, see `registered_name`.
        img_size: None leaves it the size of its pretrained_cfg.
    """
    cfg: Any = timm.get_pretrained_cfg(name)
    return dict(img_size=img_size) if img_size and cfg is not None and cfg.fixed_input_size else {}


def check_size(model: Any, network: NetworkSettings, img_size: int | None) -> None:
    """Looks at one image of the size, for most networks find out only then that they can't.

    Raises:
        UserError: If the network can't.
    """
    if img_size:
        weight, training = next(model.parameters()), model.training
        with user_errors(f'--img-size {img_size} does not suit --model {network.model}'), torch.no_grad():
            model.eval()(weight.new_zeros(1, network.channels, img_size, img_size))
        model.train(training)


def load_initial(model: nn.Module, file: str) -> None:
    """Loads --initial-checkpoint, safetensors or a checkpoint of timm's, as timm does.

    Raises:
        UserError: If it can't be read, is of another network, or isn't finite.
    """
    with user_errors(f'--initial-checkpoint {file} can not be used'):
        load_checkpoint(model, file, weights_only=True)
        check_finite(model.state_dict().items())


def digest_of(file: str | None, flag_name: str = '--initial-checkpoint') -> str | None:
    """The SHA-256 of a file of weights, if one is given by a flag."""
    if file is None:
        return None
    with user_errors(f'{flag_name} {file} can not be read'):
        return checksum(file, like='0' * 64)


def check_initial_classes(file: str | None, class_names: Sequence[str]) -> None:
    """Raises UserError if --initial-checkpoint says that it counts its classes by other names than the data's."""
    theirs = json.loads(read_metadata(file).get('label_names', 'null')) if file else None
    if theirs is not None and list(theirs) != list(class_names):
        raise UserError(f'--initial-checkpoint {file} knows the {len(theirs)} classes {", ".join(theirs[:3])} ..., and '
                        f'the data has the {len(class_names)} classes {", ".join(class_names[:3])} ...; publish.py '
                        '--dry-run makes of its run a folder for --model local-dir:FOLDER --pretrained, which takes '
                        'all weights but the classifier')


def build_network(network: NetworkSettings, depth: DepthSettings, num_classes: int, seed: int,
                  img_size: int | None = None) -> Any:
    """Builds the network and adds what the flags say of stochastic depth.

    Args:
        network: Which network.
        depth: Of its stochastic depth.
        num_classes: Of the data.
        seed: Of the gates.
        img_size: Side of the images in pixels, if it isn't the network's.

    Raises:
        UserError: If a setting doesn't suit the network.
    """
    given = dict(schedule=depth.drop_path_schedule, mode=depth.drop_path_mode, scale=depth.drop_path_scale)
    choices = {key: value for key, value in given.items() if value is not None}
    name = registered_name(network.model)
    with user_errors(f'--model {network.model}'):
        local, kwargs = local_source(network.model, network.pretrained)
        if is_ours(name):
            kwargs.update({f'drop_path_{key}': value for key, value in choices.items()}, drop_path_seed=seed)
            if depth.drop_path is not None:
                kwargs['drop_path_rate'] = depth.drop_path
        if depth.drop is not None:
            kwargs['drop_rate'] = depth.drop
        model: Any = timm.create_model(local, pretrained=network.pretrained, num_classes=num_classes, **kwargs,
                                       **dict(size_kwargs(name, img_size), **network.model_kwargs))
        if network.pretrained:
            check_loaded(model)
        check_size(model, network, img_size)
        if depth.initial_checkpoint:
            load_initial(model, depth.initial_checkpoint)
        if depth.sync_bn:
            model = convert_sync_batchnorm(model)
        if not is_ours(name) and depth.drop_path:
            timm_sd.add_stochastic_depth(model, depth.drop_path, **choices, seed=seed)
        if depth.grad_checkpointing:
            model.set_grad_checkpointing()
        if depth.compile == 'model':
            model.compile(mode=depth.torchcompile_mode)
        elif depth.compile == 'blocks':
            timm_sd.compile_blocks(model, mode=depth.torchcompile_mode)
    return model


def set_drop_path_when(model: nn.Module, depth: DepthSettings, epochs: int) -> None:
    """Lets the rates of a network change over a training of so many epochs, where the flags say so.

    Raises:
        UserError: If it has no gates, or the flags don't go together.
    """
    over_time = RateOverTime(depth.drop_path_when, epochs, depth.drop_path_change, depth.drop_path_cutoff)
    gates = timm_sd.depth_gates(model)
    with user_errors('--drop-path-when'):
        if gates is not None:
            gates.set_drop_path_when(*over_time)
        elif not over_time.is_constant:
            raise UserError('no block of the network is dropped; give a --drop-path above 0')


def first_branch_weight(model: nn.Module) -> nn.Parameter:
    """The first convolution (or linear layer) of the first residual block, whose gradients the paper's Fig. 7 shows.

    Raises:
        UserError: If the network has no residual block.
    """
    blocks = (module for module in model.modules() if drop_path_slots(module))
    weight = next((param for block in blocks for param in block.parameters() if param.ndim > 1), None)
    if weight is None:
        raise UserError(f'--log-gradients: {type(model).__name__} has no residual block with a drop_path')
    return weight

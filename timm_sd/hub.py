"""Where a network's weights come from: the package, or the Hub repository $TIMM_SD_HUB_ORG/<model.tag>.

They are turned into a local file, and the file is checked, before timm sees them. timm alone asks an unreachable Hub
for 46 seconds to 13 minutes, names neither model nor file when it gives up, trusts a damaged file for good, and would
load a pickle where there is no safetensors file.

`timm.create_model('hf-hub:ORG/NAME')` of a network that this package registers goes the same way, but for its
config.json. That one timm loads by itself before it asks us, compares with no checksum, and waits for minutes where a
Hub is silent. timm's own networks are timm's alone, also by that name.
"""
import dataclasses
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from .download import WEIGHTS_FILE, download
from .weight_files import WeightsError, check_complete, check_weights, stored_cfg


def _full_name(cfg: Any) -> str:
    return f'{cfg.architecture}.{cfg.tag}' if cfg.tag else cfg.architecture


def find(cfg: Any, cache_dir: str | None = None) -> str:
    """The local path of the weights that a pretrained_cfg means; downloads them if need be.

    Args:
        cfg: timm's PretrainedCfg, resolved.
        cache_dir: In place of the Hub's own cache.

    Raises:
        RuntimeError: If there is no place where they could be.
        OSError: If they can't be had from the Hub.
    """
    name = _full_name(cfg)
    if cfg.source == 'local-dir':
        return os.path.join(cfg.file, WEIGHTS_FILE)
    if cfg.file and cfg.source != 'hf-hub':
        return cfg.file
    if cfg.hf_hub_id:
        return download(name, cfg.hf_hub_id, cache_dir)
    org = os.environ.get('TIMM_SD_HUB_ORG')
    if not org:
        raise RuntimeError(f'{name}: the package has no such weights, and TIMM_SD_HUB_ORG is not set, whose repository '
                           f'ORG/{name} would be looked for on the Hub; pass pretrained=False for random weights')
    return download(name, f'{org}/{name}', cache_dir)


def _is_timms(cfg: Any) -> bool:
    """Whether timm is left to load by itself: a state dict, an address, or a folder that holds a pickle alone.

    Of a config.json the other sources count for nothing: it would get its weights past our checks by them.
    """
    if cfg.source == 'local-dir':
        return not Path(cfg.file, WEIGHTS_FILE).exists()
    return cfg.source != 'hf-hub' and bool(cfg.state_dict or cfg.url and not cfg.hf_hub_id and not cfg.file)


def build_model(model_cls: type[nn.Module], name: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg`, with the weights from a local file; one that doesn't fit is named in one line.

    Args:
        model_cls: The network's class.
        name: The entry point's name.
        pretrained: Load weights.
        **kwargs: The entry point's arguments.

    Raises:
        RuntimeError, OSError: If the weights can't be had, see `find`, or can't be used, see `check_weights`.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, name, False, **kwargs)
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    cfg: Any = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), overlay)
    if _is_timms(cfg):
        return build_model_with_cfg(model_cls, name, True, pretrained_cfg_overlay=overlay, **kwargs)
    path = find(cfg, kwargs.get('cache_dir'))
    overlay = dict(overlay, file=path, source='timm', state_dict=None, custom_load=False)
    registered, folder = dataclasses.asdict(resolve_pretrained_cfg(name)), Path(path).parent
    is_safe = path.endswith('.safetensors')
    try:
        if is_safe:
            by_config = cfg.source in ('hf-hub', 'local-dir') and (folder / 'config.json').exists()
            check_weights(path, stored_cfg(folder, registered) if by_config else dataclasses.asdict(cfg))
        model = build_model_with_cfg(model_cls, name, True, pretrained_cfg_overlay=overlay, **kwargs)
        if is_safe:
            check_complete(path, model, registered)
        return model
    except (RuntimeError, KeyError, WeightsError, SafetensorError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise RuntimeError(f'{_full_name(cfg)}: weights {path} do not fit: {reason}') from error

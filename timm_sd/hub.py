"""Where a network's weights come from: the package, or the Hub repository $TIMM_SD_HUB_ORG/<model.tag>.

They are turned into a local file before timm sees them. timm alone asks an unreachable Hub for 46 seconds to 13
minutes, names neither model nor file when it gives up, and would load a pickle where there is no safetensors file.
"""
import os
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

FILE = 'model.safetensors'
TIMEOUT_SECONDS = 1.5  # the client asks twice


def _reason(error: Exception) -> str:
    """What to do about an error of the Hub's client, whose own text has many lines and no file in it."""
    if isinstance(error, GatedRepoError):
        return 'access must be asked for on its page'
    if isinstance(error, RevisionNotFoundError):
        return 'there is no such revision'
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return 'there is no such file; weights other than safetensors are not loaded'
    if isinstance(error, RepositoryNotFoundError):
        return 'there is no such repository, or it is private: log in with hf auth login, or set HF_TOKEN'
    return f'the Hub does not answer as it should ({type(error).__name__}); try later, or pass pretrained=False'


def download(name: str, hub_id: str, cache_dir: str | None = None) -> str:
    """The local path of a repository's model.safetensors.

    A quick question comes first, so a Hub that can't be reached costs a few seconds; then what the cache holds must do.

    Args:
        name: The model's name, for the error.
        hub_id: 'ORG/NAME', or 'ORG/NAME@revision'.
        cache_dir: In place of the Hub's own cache.

    Raises:
        OSError: If the file can't be had, in one line.
    """
    repo, _, given = hub_id.partition('@')
    revision = given or None
    try:
        try:
            get_hf_file_metadata(hf_hub_url(repo, FILE, revision=revision), timeout=TIMEOUT_SECONDS)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except (httpx.HTTPError, OSError):
            cached = try_to_load_from_cache(repo, FILE, cache_dir, revision)
            if not isinstance(cached, str):
                raise
            return cached
        return hf_hub_download(repo, FILE, revision=revision, cache_dir=cache_dir)
    except (httpx.HTTPError, OSError, ValueError) as error:
        raise OSError(f'{name}: not in the package, and no weights from {FILE} of {hub_id} on the Hub: '
                      f'{_reason(error)}') from error


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
    if cfg.file and cfg.source != 'hf-hub':
        return cfg.file
    if cfg.hf_hub_id:
        return download(name, cfg.hf_hub_id, cache_dir)
    org = os.environ.get('TIMM_SD_HUB_ORG')
    if not org:
        raise RuntimeError(f'{name}: the package has no such weights, and TIMM_SD_HUB_ORG is not set, whose repository '
                           f'ORG/{name} would be looked for on the Hub; pass pretrained=False for random weights')
    return download(name, f'{org}/{name}', cache_dir)


def build_model(model_cls: type[nn.Module], name: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's `build_model_with_cfg`, with the weights from a local file; one that doesn't fit is named in one line.

    Args:
        model_cls: The network's class.
        name: The entry point's name.
        pretrained: Load weights.
        **kwargs: The entry point's arguments.

    Raises:
        RuntimeError, OSError: If the weights can't be had, see `find`, or don't fit.
    """
    if not pretrained:
        return build_model_with_cfg(model_cls, name, False, **kwargs)
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    cfg: Any = resolve_pretrained_cfg(name, kwargs.get('pretrained_cfg'), overlay)
    if cfg.state_dict or cfg.source == 'local-dir' or (cfg.url and not cfg.hf_hub_id and not cfg.file):  # timm's own
        return build_model_with_cfg(model_cls, name, True, pretrained_cfg_overlay=overlay, **kwargs)
    path = find(cfg, kwargs.get('cache_dir'))
    overlay = dict(overlay, file=path, source='timm')
    try:
        return build_model_with_cfg(model_cls, name, True, pretrained_cfg_overlay=overlay, **kwargs)
    except (RuntimeError, KeyError, SafetensorError) as error:
        reason = ' '.join(str(error).split())[:300]
        raise RuntimeError(f'{_full_name(cfg)}: weights {path} do not fit: {reason}') from error

"""Stochastic depth for timm that saves the compute of a dropped block; importing it registers the sd_* models."""
from .timm_version import check_timm

check_timm()

from . import resnet_cifar_sd as _resnet_cifar_sd  # noqa: E402, F401  (registers the models)
from . import resnet_sd as _resnet_sd  # noqa: E402, F401
from .convert import add_stochastic_depth, remove_stochastic_depth  # noqa: E402
from .gates import MODES, SCALES, DepthGates  # noqa: E402
from .rates import CHANGES, SCHEDULES, WHEN, drop_path_rates  # noqa: E402
from .shorten import rank_blocks, shorten  # noqa: E402
from .shortened import remove_blocks, removed_blocks  # noqa: E402
from .stochastic_depth import compile_blocks, depth_gates  # noqa: E402

__version__ = '0.1.0'
__all__ = [
    'CHANGES', 'MODES', 'SCALES', 'SCHEDULES', 'WHEN', 'DepthGates', 'add_stochastic_depth', 'compile_blocks',
    'depth_gates', 'drop_path_rates', 'rank_blocks', 'remove_blocks', 'remove_stochastic_depth', 'removed_blocks',
    'shorten',
]

"""Stochastic depth for timm that saves the compute of a dropped block; importing it registers the sd_* models."""
from . import resnet_cifar_sd as _resnet_cifar_sd  # noqa: F401  (registers the models)
from .stochastic_depth import MODES, SCALES, SCHEDULES, DepthGates, depth_gates, drop_path_rates

__version__ = '0.1.0'
__all__ = ['MODES', 'SCALES', 'SCHEDULES', 'DepthGates', 'depth_gates', 'drop_path_rates']

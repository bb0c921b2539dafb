"""Runs any script with the sd_* models registered: python -m timm_sd train.py --model sd_resnet110_cifar ...

timm's own train.py knows --device-modules; its validate.py and benchmark.py have nothing of the kind.
"""
import os
import runpy
import sys

import timm_sd  # noqa: F401  (registers the models)

if len(sys.argv) < 2:
    print('usage: python -m timm_sd SCRIPT [ARGS ...]', file=sys.stderr)
    sys.exit(2)
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as `python SCRIPT` would have it
runpy.run_path(sys.argv[0], run_name='__main__')

"""Runs any script that uses timm, with the sd_* models registered, and its timm networks made to skip what they drop.

    python -m timm_sd train.py --model sd_resnet110_cifar ...
    python -m timm_sd --drop-path-mode batch train.py --model convnext_atto --drop-path 0.3 ...

timm's own train.py knows --device-modules; its validate.py and benchmark.py have nothing of the kind.
"""
import argparse
import os
import runpy
import sys
from typing import Any, NoReturn

import timm

import timm_sd
from timm_sd.prefix import Prefix

USAGE = ('usage: python -m timm_sd [--drop-path-mode batch|subset] [--drop-path-schedule linear|uniform] '
         '[--drop-path-scale train|eval] [--drop-path-when standard|early|late] [--drop-path-change constant|linear] '
         '[--drop-path-cutoff EPOCH] SCRIPT [ARGS ...]')
VERSIONS = f'timm_sd {timm_sd.__version__} in {timm_sd.__path__[0]}, timm {timm.__version__} in {timm.__path__[0]}'


class _Parser(argparse.ArgumentParser):
    """argparse, but with one line for everything."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{message}; {USAGE} ({VERSIONS})\n')

    def print_help(self, file: Any = None) -> None:
        print(f'{USAGE} ({VERSIONS})', file=file)


def main() -> None:
    """Parses the flags in front of the script, and runs it."""
    parser = _Parser(allow_abbrev=False)
    parser.add_argument('--drop-path-mode', choices=('batch', 'subset'))
    parser.add_argument('--drop-path-schedule', choices=timm_sd.SCHEDULES)
    parser.add_argument('--drop-path-scale', choices=timm_sd.SCALES)
    parser.add_argument('--drop-path-when', choices=timm_sd.WHEN)
    parser.add_argument('--drop-path-change', choices=timm_sd.CHANGES)
    parser.add_argument('--drop-path-cutoff', type=int)
    parser.add_argument('script', nargs='?')
    parser.add_argument('args', nargs=argparse.REMAINDER)
    settings = parser.parse_args()
    if settings.script is None:
        parser.error('no script to run')
    if not os.path.isfile(settings.script):
        parser.error(f'there is no script {settings.script}')
    Prefix(settings.drop_path_mode, settings.drop_path_schedule, settings.drop_path_scale, when=settings.drop_path_when,
           change=settings.drop_path_change, cutoff=settings.drop_path_cutoff).install()
    sys.argv = [settings.script, *settings.args]
    sys.path[0] = os.path.dirname(os.path.abspath(settings.script))  # as `python SCRIPT` would have it
    runpy.run_path(settings.script, run_name='__main__')


if __name__ == '__main__':
    main()

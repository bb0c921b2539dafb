"""The scripts of bench/ as a user runs them, in this process or in one of their own."""
import contextlib
import csv
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch

from harness.cli import run_script

ROOT = Path(__file__).parent.parent.parent
BENCH = ROOT / 'bench'
# the quickstart, smaller
SMALL = ['--model', 'sd_resnet20_cifar', '--img-size', '8', '--epochs', '3', '--threads', '1', '--no-amp',
         '--drop-path-scale', 'eval']


def run_here(script, *args, terminal=False):
    """Runs a script to its end in this process: starting another one takes seconds.

    Args:
        script: File name in bench/.
        *args: Its flags.
        terminal: Let stdout say that it is one.

    Returns:
        What `bench` returns.
    """
    argv, out, err, code = [script, *map(str, args)], io.StringIO(), io.StringIO(), 0
    out.isatty = lambda: terminal
    module, threads = importlib.import_module(script.removesuffix('.py')), torch.get_num_threads()
    with mock.patch.object(sys, 'argv', argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_script(module.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            torch.set_num_threads(threads)
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def command(script, *args):
    """The command line of a script."""
    return [sys.executable, str(BENCH / script), *map(str, args)]


def bench(script, *args, **kwargs):
    """Runs a script to its end in a process of its own; returns returncode, stdout and stderr."""
    return subprocess.run(command(script, *args), capture_output=True, text=True, **kwargs)


def refused(script, *args):
    """What a script says of a mistake: one line on stderr, nothing on stdout, and exit status 2."""
    result = run_here(script, *args)
    assert result.returncode == 2, result
    assert result.stdout == ''
    assert result.stderr.startswith(f'{script}: error: ')
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    return result.stderr


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def read_results(folder):
    return json.loads((folder / 'results.json').read_text())


def weights(folder):
    return safetensors.torch.load_file(folder / 'model.safetensors')


def summary(folder):
    """The rows without the one column that is a time."""
    rows = read_csv(folder / 'summary.csv')
    return [{key: value for key, value in row.items() if key != 'train_seconds'} for row in rows]


def assert_same_weights(folder, other):
    """Two run folders hold the same weights, bit for bit."""
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(folder, other):
    """Two run folders hold the same training, bit for bit."""
    assert_same_weights(folder, other)
    assert summary(folder) == summary(other)


def assert_same_errors(folder, other):
    """Likewise, but for the rounding of the loss of what was evaluated, in other batches."""
    def without_losses(row):
        return {key: value for key, value in row.items() if key != 'eval_loss'}

    assert_same_weights(folder, other)
    assert [*map(without_losses, summary(folder))] == [*map(without_losses, summary(other))]
    ours, theirs = read_results(folder), read_results(other)
    for tested in ('test_best', 'test_last'):
        assert ours[tested] == dict(theirs[tested], loss=pytest.approx(theirs[tested]['loss'], rel=1e-5))

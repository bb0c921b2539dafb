"""train.py and validate.py in processes of their own: what a person and a script see, and the Hub's environment."""
import json
import os
import pty
import subprocess

import pytest

from support.commands import assert_same_run, bench, command, read_results

pytestmark = pytest.mark.slow


def test_a_person_sees_three_lines_and_a_script_gets_json(finished, toy_flags, tmp_path):
    args = [*toy_flags, '--output', tmp_path, '--experiment', 'a', '--resume', 'auto']
    script = bench('train.py', *args)
    assert script.returncode == 0, script.stderr
    assert_same_run(tmp_path / 'a', finished[0])  # that of another process
    assert json.loads(script.stdout) == dict(run_folder=str(tmp_path / 'a'), **read_results(tmp_path / 'a'))
    outside, inside = pty.openpty()
    with os.fdopen(outside, 'rb', buffering=0) as terminal:
        person = subprocess.run(command('train.py', *args), stdout=inside, stderr=subprocess.PIPE, text=True)
        os.write(inside, b'nothing else\n')
        assert terminal.read(1000) == b'nothing else\r\n'
        os.close(inside)
    assert person.returncode == 0, person.stderr
    assert person.stderr.splitlines() == script.stderr.splitlines()[-3:]
    assert [line[:12] for line in person.stderr.splitlines()] == ['run folder  ', 'test error  ', 'time        ']


def test_validate_finds_the_stated_error(finished, toy_folder):
    result = bench('validate.py', '--checkpoint', finished[0] / 'model.safetensors', '--data-dir', toy_folder)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)['top1_err'] == read_results(finished[0])['test_best']['top1_err']


def test_offline_without_a_copy_is_one_line(hub, tmp_path):
    env = dict(os.environ, HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='1')
    result = bench('train.py', '-c', 'cifar10', '--output', tmp_path / 'output', env=env)
    assert result.returncode == 2
    assert "data set 'uoft-cs/cifar10': the Hub is unreachable and it is not in the cache" in result.stderr
    assert hub.requests == []
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / 'output').exists()

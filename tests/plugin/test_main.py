"""python -m timm_sd: any script, with the models registered."""
import runpy
import subprocess
import sys

import pytest


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text('import sys, timm\n'
                    'print(__name__, timm.is_model("sd_resnet20_cifar"), sys.argv[1:], sys.path[0])\n')
    return path


def test_a_script_runs_as_if_it_were_called_itself(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm_sd', str(script), '--flag', '1'])
    monkeypatch.setattr(sys, 'path', ['', *sys.path])
    runpy.run_module('timm_sd', run_name='__main__')
    assert capsys.readouterr().out == f"__main__ True ['--flag', '1'] {script.parent}\n"


def test_without_a_script_it_says_what_it_wants(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm_sd'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module('timm_sd', run_name='__main__')
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith('usage: python -m timm_sd SCRIPT')


@pytest.mark.slow
def test_it_registers_the_models_in_a_fresh_process(script):
    run = subprocess.run([sys.executable, '-m', 'timm_sd', str(script), '--flag', '1'], capture_output=True, text=True)
    assert run.stdout == f"__main__ True ['--flag', '1'] {script.parent}\n"
    assert subprocess.run([sys.executable, '-m', 'timm_sd'], capture_output=True).returncode == 2

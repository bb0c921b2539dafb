"""python -m timm_sd: any script, with the models registered."""
import importlib.util
import runpy
import subprocess
import sys

import pytest
import timm

import timm_sd
from timm_sd.timm_version import check_timm


@pytest.fixture
def script(tmp_path):
    path = tmp_path / 'script.py'
    path.write_text('import sys, timm\n'
                    'print(__name__, timm.is_model("sd_resnet20_cifar"), sys.argv[1:], sys.path[0])\n')
    return path


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, **kwargs)


def test_a_script_runs_as_if_it_were_called_itself(script):
    for flags in ([], ['--drop-path-mode', 'batch', '--drop-path-schedule=uniform', '--drop-path-scale', 'eval']):
        run = python('-m', 'timm_sd', *flags, script, '--flag', '1', '--drop-path-mode')
        assert run.stdout == f"__main__ True ['--flag', '1', '--drop-path-mode'] {script.parent}\n", run.stderr
        assert run.stderr == ''


@pytest.mark.parametrize(('args', 'words'), [
    ([], 'no script to run'),
    (['nowhere.py'], 'there is no script nowhere.py'),
    (['--drop-path-mode', 'rows', 'x.py'], "'rows'"),
    (['--drop-path-mod', 'batch', 'x.py'], '--drop-path-mod'),
    (['--drop-path-mode', 'batch'], 'no script to run'),
])
def test_mistakes_are_one_line_with_versions_and_paths(args, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm_sd', *args])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module('timm_sd', run_name='__main__')
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    for word in (words, 'usage: python -m timm_sd', f'timm_sd {timm_sd.__version__} in {timm_sd.__path__[0]}',
                 f'timm {timm.__version__} in {timm.__path__[0]}'):
        assert word in line


def test_help_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['timm_sd', '--help'])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module('timm_sd', run_name='__main__')
    assert not stop.value.code
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('usage: python -m timm_sd [--drop-path-mode batch|subset]')


@pytest.fixture
def old_timm(tmp_path):
    """A folder with a clone of an old timm that can't even be imported."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text('raise RuntimeError\n')
    (tmp_path / 'timm' / 'version.py').write_text("__version__ = '0.9.2'\n")
    return tmp_path


def test_an_old_timm_in_the_working_folder_is_one_line(script, old_timm):
    run = python('-m', 'timm_sd', script, cwd=old_timm)
    assert (run.returncode, run.stdout) == (2, '')
    (line,) = run.stderr.splitlines()
    assert line.startswith('timm_sd needs timm 1.0.31 or newer, and timm 0.9.2 in ')
    assert str(old_timm / 'timm') in line
    run = python('-c', 'import timm_sd', cwd=old_timm)
    assert run.stderr.splitlines()[-1] == f'ImportError: {line}'


@pytest.mark.parametrize(('version', 'is_old'), [
    ('1.0.31', False), ('1.0.32.dev0', False), ('1.1.0', False), ('2', False), ('1.0.30', True), ('1.0.9', True)])
def test_versions_are_compared_as_numbers(version, is_old, old_timm, monkeypatch):
    (old_timm / 'timm' / 'version.py').write_text(f"__version__ = '{version}'\n")
    spec = importlib.util.spec_from_file_location('timm', old_timm / 'timm' / '__init__.py')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: spec)
    if is_old:
        with pytest.raises(ImportError, match=version):
            check_timm()
    else:
        check_timm()


SPAWNS = """
import torch
from torch.utils.data import DataLoader, Dataset

class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index

if __name__ == '__main__':
    print(sorted(torch.cat(list(DataLoader(Numbers(), 2, num_workers=1, multiprocessing_context='spawn'))).tolist()))
"""


@pytest.mark.slow
def test_workers_find_the_classes_of_the_script(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(SPAWNS)
    run = python('-m', 'timm_sd', script)
    assert run.stdout == '[0, 1, 2, 3]\n', run.stderr

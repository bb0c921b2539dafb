"""A run that was stopped and goes on equals one that nobody disturbed, bit for bit."""
import os
import shutil
import zipfile
from types import SimpleNamespace

import pytest
import torch

from harness import engine, resume, training
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_results, refused, run_here


class Stopped(BaseException):
    """Like a kill it passes through every `except Exception`."""


def stopped(monkeypatch, updates, *args):
    """Runs train.py until it has made so many updates."""
    left, update = [None] * updates, engine.TrainStep.update

    def counted(step):
        if not left:
            raise Stopped
        left.pop()
        update(step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.TrainStep, 'update', counted)
        with pytest.raises(Stopped):
            run_here('train.py', *args)


@pytest.fixture
def copy(finished, toy_flags, tmp_path):
    """A complete run to be damaged: its folder, and the flags that go on with it."""
    shutil.copytree(finished[0], tmp_path / 'copy')
    return tmp_path / 'copy', [*toy_flags, '--output', tmp_path, '--experiment', 'copy', '--resume', 'auto']


@pytest.mark.parametrize('how', ['gates', 'masks'])
def test_stopped_anywhere_and_resumed_equals_undisturbed(toy_flags, finished, tmp_path, monkeypatch, how):
    """In the first epoch, in the second, right behind the second. The masks of mode sample come from torch."""
    args, whole = [*toy_flags, '--output', tmp_path], finished[0]
    if how == 'masks':
        args += ['--drop-path-mode', 'sample', '--drop-path-scale', 'train', '--drop-path', '0.5']
        assert run_here('train.py', *args, '--experiment', 'whole').returncode == 0
        whole = tmp_path / 'whole'
    args += ['--experiment', 'a', '--resume', 'auto']
    checkpoints = tmp_path / 'a' / 'checkpoints'
    for updates, epochs in ((3, []), (7, [1]), (5, [1, 2])):  # of five in an epoch; each run begins at its checkpoint
        stopped(monkeypatch, updates, *args)
        assert sorted(path.name for path in checkpoints.glob('checkpoint-*')) == [
            f'checkpoint-{epoch:04d}.pt' for epoch in epochs]
        assert not (tmp_path / 'a' / 'results.json').exists()
    result = run_here('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'a', whole)
    assert read_results(tmp_path / 'a')['test_last'] == read_results(whole)['test_last']


@pytest.mark.slow
def test_stopped_in_any_write_and_resumed_equals_undisturbed(toy_flags, tmp_path, monkeypatch):
    """As a kill would, it leaves the new file beside the old one; of five epochs the third and the fourth are best."""
    args = [*toy_flags, '--epochs', '5', '--checkpoint-interval', '2', '--output', tmp_path, '--resume', 'auto',
            '--experiment']
    run_epoch, evaluate, replace, writes = training.Trainer.run_epoch, training.evaluate, os.replace, []

    def run_noted_epoch(trainer, epoch, *args):
        noted.epoch = epoch
        return run_epoch(trainer, epoch, *args)

    def found(*args):
        return dict(evaluate(*args), top1=[10., 0., 20., 30., 0.][noted.epoch])

    def counted(source, target):
        writes.append(target)
        if len(writes) == noted.last_write:
            raise Stopped
        replace(source, target)

    def folder_after(name):
        assert run_here('train.py', *args, name).returncode == 0
        return tmp_path / name, sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob('*'))

    noted = SimpleNamespace(epoch=0, last_write=None)
    monkeypatch.setattr(training.Trainer, 'run_epoch', run_noted_epoch)
    monkeypatch.setattr(training, 'evaluate', found)
    monkeypatch.setattr(os, 'replace', counted)
    whole, files = folder_after('whole')
    assert [path.name for path in writes if 'checkpoints' in path.parts] == [  # the best weights once, and first
        'best-0001.safetensors', 'checkpoint-0002.pt', 'best-0004.safetensors', 'checkpoint-0004.pt',
        'checkpoint-0005.pt']
    for last_write in range(1, len(writes) + 1):
        writes.clear()
        noted.last_write, name = last_write, f'stopped-{last_write}'
        with pytest.raises(Stopped):
            run_here('train.py', *args, name)
        noted.last_write = None
        resumed, resumed_files = folder_after(name)
        assert_same_run(resumed, whole)
        assert read_results(resumed)['best_epoch'] == read_results(whole)['best_epoch'] == 3
        assert resumed_files == files


def test_damaged_newest_checkpoint_is_passed_over(copy, finished):
    folder, args = copy
    newest = folder / 'checkpoints' / 'checkpoint-0003.pt'
    with zipfile.ZipFile(newest) as archive:
        tensor = max(archive.infolist(), key=lambda record: record.file_size)
    content = bytearray(newest.read_bytes())
    content[tensor.header_offset + tensor.file_size // 2] ^= 1  # one bit; between tensors, padding would not matter
    newest.write_bytes(content)
    left = folder / 'checkpoints' / 'checkpoint-0003.pt.7'  # more parts than the next one will have
    left.write_bytes(b'')
    for name in ('results.json', 'model.safetensors', 'summary.csv'):
        (folder / name).unlink()
    result = run_here('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert f'warning: {newest} is damaged' in result.stderr
    assert result.stderr.count('train_loss') == 1  # of the third epoch alone
    assert not left.exists()
    assert_same_run(folder, finished[0])


def test_stopped_while_finishing(copy, finished):
    folder, args = copy
    for name in ('results.json', 'model.safetensors', 'summary.csv', 'curves.png', 'mistakes.png'):
        (folder / name).unlink()
    result = run_here('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert 'train_loss' not in result.stderr  # nothing was trained
    assert_same_run(folder, finished[0])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def change_state(path, **changed):
    """Saves a checkpoint with something else in it; None takes it out."""
    state = dict(torch.load(path), **changed)
    torch.save({key: value for key, value in state.items() if value is not None}, path)


DAMAGES = {
    'empty': lambda path: path.write_bytes(b''),
    'cut': lambda path: path.write_bytes(path.read_bytes()[:5000]),
    'noise': lambda path: path.write_bytes(bytes(range(256)) * 40),
    'no dict': lambda path: torch.save([1, 2], path),
    'no network': lambda path: change_state(path, network=None),
    'no optimizer': lambda path: change_state(path, optimizer=None),
    'no epoch': lambda path: change_state(path, epoch=None),
    'other epoch': lambda path: change_state(path, epoch='many'),
    'other rows': lambda path: change_state(path, rows=[]),
    'other shapes': lambda path: change_state(path, network={'conv1.weight': torch.zeros(1)}),
    'other groups': lambda path: change_state(path, optimizer=dict(state={}, param_groups=[])),
}


@pytest.mark.parametrize('named', [True, False])
@pytest.mark.parametrize('damage', DAMAGES)
def test_where_no_checkpoint_can_be_read_nothing_is_begun_or_removed(copy, damage, named):
    folder, args = copy
    for path in folder.glob('checkpoints/checkpoint-*.pt'):
        DAMAGES[damage](path)
    (folder / 'results.json').unlink()
    before = contents(folder)
    if not named:
        args = [*args[:args.index('--output')], '--resume', folder]
    result = run_here('train.py', *args)
    assert (result.returncode, result.stdout) == (2, '')
    *_, said = result.stderr.splitlines()
    assert said.startswith(f'train.py: error: {folder} has no checkpoint that can be read: ')
    assert 'checkpoint-0003.pt is damaged' in said
    assert 'another --experiment' in said
    assert contents(folder) == before


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_checkpoint_that_can_not_be_gone_back_to_is_passed_over(copy, finished, damage):
    folder, args = copy
    DAMAGES[damage](folder / 'checkpoints' / 'checkpoint-0003.pt')
    (folder / 'results.json').unlink()
    result = run_here('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count('checkpoint-0003.pt is damaged') == 1
    assert_same_run(folder, finished[0])


BROKEN = [b'', b'a: [', bytes(range(256)), b'- a\n', b'a: 2020-13-45\n', b'\0\0', 'a: 1'.encode('utf-16')]


@pytest.mark.parametrize('resume', ['auto', 'folder', None])
@pytest.mark.parametrize('broken', [*BROKEN, None])
def test_a_run_whose_flags_can_not_be_read_is_left_alone(copy, broken, resume):
    folder, args = copy
    if broken is None:
        (folder / 'args.yaml').unlink()
    else:
        (folder / 'args.yaml').write_bytes(broken)
    (folder / 'results.json').unlink()
    before = contents(folder)
    args = args[:-2] + {'auto': ['--resume', 'auto'], 'folder': ['--resume', folder], None: []}[resume]
    said = refused('train.py', *args)
    assert str(folder) in said
    assert 'args.yaml' in said
    assert 'another --experiment' in said
    assert contents(folder) == before


@pytest.mark.parametrize('left', ['checkpoints/best-0001.safetensors', 'summary.csv', 'results.json'])
def test_a_folder_with_something_of_a_run_is_not_taken_for_a_new_one(toy_flags, tmp_path, left):
    path = tmp_path / 'a' / left
    path.parent.mkdir(parents=True)
    path.write_bytes(b'of a run')
    said = refused('train.py', *toy_flags, '--output', tmp_path, '--experiment', 'a', '--resume', 'auto')
    assert f'has a {path.name} of a run, but no args.yaml' in said
    assert contents(tmp_path) == {path: b'of a run'}


def test_a_folder_of_other_things_is_a_new_run(toy_flags, tmp_path):
    (tmp_path / 'a' / 'checkpoints').mkdir(parents=True)  # as a kill leaves it
    (tmp_path / 'a' / 'notes.txt').write_text('mine')
    assert run_here('train.py', *toy_flags, '--epochs', '1', '--output', tmp_path, '--experiment', 'a').returncode == 0
    assert (tmp_path / 'a' / 'notes.txt').read_text() == 'mine'


@pytest.mark.parametrize('broken', [b'', b'{"model": "sd_res', b'[1]', b'null', bytes(range(256)), b'{}'])
def test_results_that_can_not_be_read_are_written_anew_without_them(copy, finished, broken):
    folder, args = copy
    results = folder / 'results.json'
    results.write_bytes(broken)
    before = contents(folder)
    said = refused('train.py', *args)
    assert str(results) in said
    assert 'remove results.json and run the same training again' in said
    assert contents(folder) == before
    results.unlink()
    result = run_here('train.py', *args)
    assert result.returncode == 0, result.stderr
    assert 'train_loss' not in result.stderr  # nothing was trained
    assert_same_run(folder, finished[0])


def test_best_weights_that_are_lost_are_told(copy):
    folder, args = copy
    for path in folder.glob('checkpoints/best-*'):
        path.unlink()
    (folder / 'results.json').unlink()
    result = run_here('train.py', *args)
    assert result.returncode == 2
    assert 'holds the best weights, and can not be read' in result.stderr.splitlines()[-1]


def test_a_run_begun_by_an_older_version_is_refused_and_left_alone(copy):
    """Its checkpoints held the tensors of scale 'eval' without p_l."""
    folder, args = copy
    newest = folder / 'checkpoints' / 'checkpoint-0003.pt'
    state = torch.load(newest)
    torch.save(dict(state, raw_model=state.pop('network')), newest)
    (folder / 'results.json').unlink()
    before = contents(folder)
    result = run_here('train.py', *args)
    assert result.returncode == 2
    assert 'was begun by an older version of timm-sd' in result.stderr.splitlines()[-1]
    assert contents(folder) == before


def test_without_resume_an_old_run_is_not_overwritten(copy):
    folder, args = copy
    before = contents(folder)
    assert 'exists; go on with --resume auto' in refused('train.py', *args[:-2])
    assert contents(folder) == before


@pytest.mark.parametrize(('flags', 'words'), [
    (['--lr', '0.5'], ['lr 0.1 -> 0.5']), (['--epochs', '4'], ['epochs 3 -> 4']), (['--seed', '1'], ['seed 0 -> 1']),
    (['-b', '4'], ['global_batch_size 8 -> 4'])])
def test_other_flags_than_the_run_had(copy, flags, words):
    said = refused('train.py', *copy[1], *flags)
    assert all(word in said for word in words)


def test_a_run_goes_on_in_its_precision_where_the_flags_do_not_name_one(copy, finished, monkeypatch):
    folder, args = copy
    (folder / 'results.json').unlink()
    RunFolder(folder).remove_after(2)
    monkeypatch.setattr(resume, 'default_amp', lambda device_type: True)
    result = run_here('train.py', *[flag for flag in args if flag != '--no-amp'])
    assert result.returncode == 0, result.stderr
    assert ', fp32,' in result.stderr.splitlines()[0]
    assert_same_run(folder, finished[0])
    assert read_results(folder)['args']['amp'] is False


def test_a_run_is_gone_on_with_by_its_folder(copy, finished):
    folder, args = copy
    (folder / 'results.json').unlink()
    RunFolder(folder).remove_after(2)
    at = args.index('--output')
    result = run_here('train.py', *args[:at], '--log-interval', '7', '--resume', folder)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, finished[0])

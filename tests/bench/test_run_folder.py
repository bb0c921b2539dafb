"""The run folder: a state in several files, files in one piece, and which folder the flags mean."""
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from harness import files, resume
from harness.errors import UserError
from harness.recipes import parse_train_flags
from harness.resume import FolderSettings, find_run_folder, open_run_folder
from harness.run_folder import COLUMNS, RunFolder
from support.commands import refused

LAYER = 'layer.weight'


def state(epoch):
    return dict(epoch=epoch, weights={LAYER: torch.randn(100, generator=torch.Generator().manual_seed(epoch))})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'PART_BYTES', 500)
    folder = RunFolder(tmp_path)
    folder.create({})
    for epoch in (1, 2, 3):
        folder.save_best(state(epoch)['weights'], epoch - 1)
        folder.save_checkpoint(state(epoch), history=2)
    return folder


def test_no_file_is_larger_than_a_part(folder):
    sizes = [path.stat().st_size for path in folder.checkpoints.iterdir()]
    assert max(sizes) <= 500
    assert sum(sizes) > 5 * 400  # the tensors of two checkpoints and three bests


def test_what_was_saved_is_loaded(folder):
    loaded = folder.load_checkpoint()
    assert loaded['epoch'] == 3
    assert torch.equal(loaded['weights'][LAYER], state(3)['weights'][LAYER])
    assert torch.equal(folder.load_best(0)[LAYER], state(1)['weights'][LAYER])


def test_history_goes_with_all_its_parts(folder):
    folder.save_best(state(4)['weights'], 3)
    folder.save_checkpoint(state(4), history=2)
    epochs = {path.name.partition('.')[0] for path in folder.checkpoints.iterdir()}
    assert epochs == {'checkpoint-0003', 'checkpoint-0004', 'best-0002', 'best-0003', 'best-0004'}
    orphan = folder.checkpoints / 'checkpoint-0001.pt.1'
    orphan.write_bytes(b'left by a kill')
    folder.save_checkpoint(state(4), history=2)
    assert not orphan.exists()
    folder.remove_after(3)
    assert {path.name.partition('.')[0] for path in folder.checkpoints.iterdir()} == epochs - {
        'checkpoint-0004', 'best-0004'}


def test_killed_between_two_parts(folder, monkeypatch, capsys):
    written = []

    def write_two(path, content, write=files.write_atomic):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    monkeypatch.setattr(files, 'write_atomic', write_two)
    with pytest.raises(KeyboardInterrupt):
        folder.save_checkpoint(state(4), history=2)
    assert folder.load_checkpoint()['epoch'] == 3
    assert not capsys.readouterr().err
    assert list(folder.checkpoints.glob('checkpoint-0004*'))
    folder.remove_after(3)
    assert not list(folder.checkpoints.glob('checkpoint-0004*'))


@pytest.mark.parametrize('damage', ['lost', 'damaged'])
def test_a_state_without_one_of_its_parts_is_passed_over(folder, damage, capsys):
    part = folder.checkpoints / 'checkpoint-0003.pt.1'
    content = part.read_bytes()
    part.unlink()
    if damage == 'damaged':
        part.write_bytes(content[::-1])
    assert folder.load_checkpoint()['epoch'] == 2
    assert 'checkpoint-0003.pt is damaged' in capsys.readouterr().err


def test_a_file_that_can_not_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    path = tmp_path / 'file'
    files.write_atomic(path, b'old')

    def full(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(UserError, match=f'{path} can not be written .No space left on device.'):
        files.write_atomic(path, b'new and longer')
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('folder', ['.', 'elsewhere'])
@pytest.mark.parametrize('there', [True, False])
def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path, folder, there):
    target, link = tmp_path / folder / 'target', tmp_path / 'link'
    target.parent.mkdir(exist_ok=True)
    if there:
        target.write_bytes(b'old')
    link.symlink_to(f'{folder}/target')
    files.write_atomic(link, b'new')
    assert link.is_symlink()
    assert not target.is_symlink()
    assert target.read_bytes() == b'new'
    assert {path.name for path in tmp_path.rglob('*') if path.is_file()} == {'link', 'target'}  # no temporary file


def make_odd(path, kind):
    """Puts something at `path` that is no regular file."""
    if kind == 'folder':
        path.mkdir()
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'socket':
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    else:
        path.symlink_to(dict(device='/dev/null', full='/dev/full', loop=path.name)[kind])


ODD = ['folder', 'pipe', 'socket', 'device', 'full', 'loop']


@pytest.mark.parametrize('kind', ODD)
def test_what_is_no_file_is_not_written_to(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
    path = Path('odd')
    make_odd(path, kind)
    before = path.lstat()
    with pytest.raises(UserError, match='^odd can not be written'):
        files.write_atomic(path, b'new')
    assert path.lstat() == before
    assert os.listdir() == ['odd']


@pytest.mark.parametrize('name', ['nowhere/file', 'file/file', 'x' * 300])
def test_a_place_for_no_file_is_told_in_one_line(tmp_path, name):
    (tmp_path / 'file').write_bytes(b'old')
    with pytest.raises(UserError, match='can not be written'):
        files.write_atomic(tmp_path / name, b'new')
    assert os.listdir(tmp_path) == ['file']


def test_only_one_process_trains_in_a_folder(tmp_path):
    """Another process locks it as this one would, and later tries to share it."""
    (tmp_path / 'checkpoints').mkdir()
    other = ('import fcntl, sys\n'
             'with open(sys.argv[1], "r+") as file:\n'
             '    fcntl.lockf(file, fcntl.{how} | fcntl.LOCK_NB)\n'
             '    print("locked", flush=True)\n'
             '    sys.stdin.read()')
    lock = tmp_path / 'checkpoints' / '.lock'
    lock.touch()
    with subprocess.Popen([sys.executable, '-c', other.format(how='LOCK_EX'), str(lock)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == 'locked\n'
        with pytest.raises(UserError, match='is being trained by another process'):
            RunFolder(tmp_path).lock()
        process.stdin.close()
    RunFolder(tmp_path).lock()
    result = subprocess.run([sys.executable, '-c', other.format(how='LOCK_SH'), str(lock)],
                            stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode != 0
    assert 'BlockingIOError' in result.stderr


def find(output, resume=None, experiment=None, **flags):
    """The folder that these flags mean; the first time it is made."""
    flags = dict(dict(output=str(output), resume=resume, experiment=experiment, lr=0.1, threads=1, data_dir=None,
                      amp=False,
                      batch_size=8, global_batch_size=8, validation_batch_size=None, checkpoint_interval=1), **flags)
    folder = find_run_folder(FolderSettings(str(output), experiment, resume), flags, 'net-32').folder
    folder.create(flags)
    return folder.path


def test_auto_goes_on_with_the_newest_run_of_the_same_flags(tmp_path):
    for age, (name, lr) in enumerate((('newest', 0.5), ('newer', 0.1), ('old', 0.1))):
        path = find(tmp_path, experiment=name, lr=lr)
        os.utime(path / 'args.yaml', (10**9 - age, 10**9 - age))
    assert find(tmp_path, resume='auto') == tmp_path / 'newer'
    # what changes nothing that is computed may differ; two processes of four images are as one of eight
    assert find(tmp_path, resume='auto', threads=2, data_dir='elsewhere', batch_size=4,
                validation_batch_size=5, checkpoint_interval=3) == tmp_path / 'newer'
    assert find(tmp_path, resume='auto', lr=0.5) == tmp_path / 'newest'
    assert find(tmp_path, resume='auto', experiment='old') == tmp_path / 'old'
    assert find(tmp_path, resume=str(tmp_path / 'old')) == tmp_path / 'old'
    new = find(tmp_path, resume='auto', lr=0.7)
    assert new.parent == tmp_path
    assert new.name.endswith('-net-32')
    for changed, words in ((dict(lr=0.7), 'lr 0.1 -> 0.7'), (dict(global_batch_size=16), 'global_batch_size 8 -> 16')):
        with pytest.raises(UserError, match=words):
            find(tmp_path, resume='auto', experiment='old', **changed)
        with pytest.raises(UserError, match=words):
            find(tmp_path, resume=str(tmp_path / 'old'), **changed)
    with pytest.raises(UserError, match='exists; go on with --resume auto'):
        find(tmp_path, experiment='old')
    with pytest.raises(UserError, match='has no args.yaml'):
        find(tmp_path, resume=str(tmp_path / 'nowhere'))


def test_a_run_goes_on_in_the_precision_of_its_beginning(tmp_path, monkeypatch):
    """Whatever is faster when it goes on; of a new run that decides, unless the flags do."""
    accelerator = Accelerator(cpu=True)

    def settled(amp, is_faster, experiment=None):
        monkeypatch.setattr(resume, 'default_amp', lambda device_type: is_faster)
        flags = dict(lr=0.1, amp=amp)
        settings = FolderSettings(str(tmp_path / str(begun)), experiment, resume='auto')
        folder = open_run_folder(settings, flags, accelerator, 'net-32')
        assert folder.read_flags() == flags
        return folder.path, flags['amp']

    for begun in (False, True):
        path, amp = settled(None, begun)
        assert amp is begun
        assert settled(None, not begun) == settled(begun, not begun) == (path, begun)
        with pytest.raises(UserError, match=f'amp {begun} -> {not begun}'):
            settled(not begun, begun, path.name)
        other, amp = settled(not begun, begun, 'other')
        assert other != path
        assert amp is not begun


def test_a_run_of_a_hub_repository_is_found_again(tmp_path):
    flags = dict(output=str(tmp_path), resume='auto', experiment=None, amp=False, model='hf-hub:our/net')
    settings = FolderSettings(output=str(tmp_path), resume='auto')
    new = find_run_folder(settings, flags, 'hf-hub:our/net-32').folder
    assert new.path.parent == tmp_path
    new.create(flags)
    assert find_run_folder(settings, flags, 'hf-hub:our/net-32').folder.path == new.path


@pytest.mark.parametrize('name', ['', '.', '..', '/', 'a/b', '../a', '/tmp/a', 'a/', './a', 'a\0b', 'a\nb'])
def test_a_run_folder_is_one_folder_below_output(name, tmp_path):
    said = refused('train.py', '--output', tmp_path / 'output', '--experiment', name)
    assert 'argument --experiment' in said
    assert repr(name) in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['a', 'a.b-c', '...a', 'ä b', '-a'])
def test_other_names_are_names(name):
    assert parse_train_flags([f'--experiment={name}']).experiment == name


def test_auto_passes_over_what_it_can_not_read(tmp_path):
    for age, name in enumerate(('broken', 'a pipe', 'whole')):
        path = find(tmp_path, experiment=name) / 'args.yaml'
        os.utime(path, (10**9 - age, 10**9 - age))
    (tmp_path / 'broken' / 'args.yaml').write_text('a: [')
    (tmp_path / 'a pipe' / 'args.yaml').unlink()
    os.mkfifo(tmp_path / 'a pipe' / 'args.yaml')
    assert find(tmp_path, resume='auto') == tmp_path / 'whole'


# --- what is read of it


def test_rows_are_read_as_they_were_written(tmp_path):
    rows = [dict.fromkeys(COLUMNS, number + 0.25) for number in range(3)]
    RunFolder(tmp_path).write_summary(rows)
    assert RunFolder(tmp_path).read_summary() == rows
    assert RunFolder(tmp_path).epochs_written() == 3


@pytest.mark.parametrize(('change', 'words'), [
    (lambda whole: whole[:-6], 'row 3'),
    (lambda whole: whole + b'5,', 'row 4'),
    (lambda whole: whole + b'\0' * 20 + b'\n', 'row 4'),
    (lambda whole: whole.replace(b'4,4,4', b'4,x,4'), 'row 3'),
    (lambda whole: whole.replace(b'4,4,4', b'4,,4'), 'row 3'),
    (lambda whole: whole + b'1,' * 9 + b'1\n', 'row 4'),
    (lambda whole: whole + bytes(range(128, 256)), 'row 4'),
    (lambda whole: bytes(range(256)), 'lacks epoch'),
    (lambda whole: b'', 'lacks epoch'),
    (lambda whole: whole[:20], 'lacks eval_loss'),
    (lambda whole: whole.splitlines()[0], 'lacks rows'),
])
def test_a_damaged_row_is_named(tmp_path, change, words):
    path = tmp_path / 'summary.csv'
    RunFolder(tmp_path).write_summary([dict.fromkeys(COLUMNS, number) for number in (2, 3, 4)])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=f'{path} .*{words}.*; remove results.json and run the same training again'):
        RunFolder(tmp_path).read_summary()


def test_a_summary_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match='summary.csv can not be read'):
        RunFolder(tmp_path).read_summary()

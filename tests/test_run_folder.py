"""bench/run_folder.py: a state that lies in several files."""
import pytest
import torch

import run_folder
from run_folder import RunFolder, find_run_folder

LAYER = 'layer.weight'


def state(epoch):
    return dict(epoch=epoch, weights={LAYER: torch.randn(100, generator=torch.Generator().manual_seed(epoch))})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, 'PART', 500)
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

    def write_two(path, content, write=run_folder.write_atomic):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    monkeypatch.setattr(run_folder, 'write_atomic', write_two)
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


def test_a_run_of_a_hub_repository_is_found_again(tmp_path):
    args = dict(output=str(tmp_path), resume='auto', experiment=None, model='hf-hub:our/net')
    new = find_run_folder(args, 'hf-hub:our/net-32')
    assert new.path.parent == tmp_path
    new.create(args)
    assert find_run_folder(args, 'hf-hub:our/net-32').path == new.path

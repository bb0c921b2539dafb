"""Data on two real processes (gloo): one looks for it and tells the other, and a stream goes on on both."""
import shutil
import tempfile
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from test_own_pictures import OWN, write_tree

from harness.data import sources
from harness.data.columns import open_split
from harness.data.sources import SourceSettings, open_data
from harness.errors import UserError
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_results, run_here
from support.data import write_classes
from support.ranks import on_two_ranks

pytestmark = pytest.mark.slow


def shared_folder():
    """One folder for both processes."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    place = [tempfile.mkdtemp() if accelerator.is_main_process else None]
    broadcast_object_list(place)
    return Path(place[0])


def one_process_looks_and_tells_the_other():
    accelerator, folder = Accelerator(cpu=True), shared_folder()
    if accelerator.is_main_process:
        write_tree(folder / 'pets', train__cat=3, train__dog=2)
    accelerator.wait_for_everyone()
    looked, find = [], sources.find_pictures
    sources.find_pictures = lambda root: looked.append(root) or find(root)
    source = SourceSettings(data_dir=str(folder / 'pets'))
    data = open_data(source, accelerator)
    split = open_split(data, source, 'train')
    assert split.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.origin.keys() == {'folder', 'fingerprint'}
    assert len(looked) == accelerator.is_main_process
    if accelerator.is_main_process:
        (folder / 'pets' / 'train' / 'emu').mkdir()
    with pytest.raises(UserError, match='class folder without a picture'):  # on both
        open_data(source, accelerator)


def pictures_train():
    folder = shared_folder()
    if PartialState().is_main_process:
        write_tree(folder / 'pets', cat=15, dog=12)
    PartialState().wait_for_everyone()
    result = run_here('train.py', *OWN, '-b', '2', '--data-dir', folder / 'pets', '--output', folder,
                      '--require-processes', '2')
    assert result.returncode == 0, result.stderr
    if PartialState().is_main_process:
        assert read_results(folder / 'a')['images'] == dict(train=24, val=3, test=3)


def a_stream_resumes():
    """Two workers each: four readers of one file. The test images are counted as they come."""
    folder, state = shared_folder(), PartialState()
    if state.is_main_process:
        write_classes(folder / 'data', classes=2, train=14, test=5)
    state.wait_for_everyone()
    args = ['--data-dir', folder / 'data', '--no-in-memory', '--streaming', '--val-split', 'test', '--model',
            'sd_resnet20_cifar', '--img-size', '8', '-b', '2', '--threads', '1', '--no-amp', '-j', '2', '--epoch-size',
            '12', '--epochs', '3', '--checkpoint-hist', '3', '--output', folder, '--experiment']
    whole = run_here('train.py', *args, 'whole')
    assert whole.returncode == 0, whole.stderr
    if state.is_main_process:
        assert read_results(folder / 'whole')['images'] == dict(train=12, val=10, test=10)
        shutil.copytree(folder / 'whole', folder / 'again')
        (folder / 'again' / 'results.json').unlink()
        RunFolder(folder / 'again').remove_after(1)
    state.wait_for_everyone()
    again = run_here('train.py', *args, 'again', '--resume', 'auto')
    assert again.returncode == 0, again.stderr
    if state.is_main_process:
        assert_same_run(folder / 'again', folder / 'whole')


def test_on_two_ranks():
    on_two_ranks(one_process_looks_and_tells_the_other, pictures_train, a_stream_resumes)

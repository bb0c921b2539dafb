"""Trackers: TensorBoard is told what summary.csv holds, also by a run that was resumed."""
import json

import pytest

from support.commands import read_csv, refused, run_here


def told(folder):
    """Scalars by name: step and value of each event."""
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    events = reader.EventAccumulator(str(folder / 'timm-sd'))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()['scalars']}


@pytest.mark.parametrize('name', ['tensorboard', 'all'])
def test_each_epoch_is_told(toy_flags, tmp_path, name):
    args = ['train.py', *toy_flags, '--log-with', name, '--output', tmp_path, '--experiment', 'a']
    result = run_here(*args)
    assert result.returncode == 0, result.stderr
    rows, scalars = read_csv(tmp_path / 'a' / 'summary.csv'), told(tmp_path / 'a')
    assert scalars.keys() == rows[0].keys()
    for key, events in scalars.items():
        assert events == [(step, pytest.approx(float(row[key]), rel=1e-5)) for step, row in enumerate(rows)]
    assert json.loads(result.stdout)['changed_from_recipe'].get('log_with') is None


def test_a_resumed_run_goes_on_telling(toy_flags, tmp_path):
    args = ['train.py', *toy_flags, '--output', tmp_path, '--experiment', 'a', '--resume', 'auto']
    assert run_here(*args).returncode == 0
    (tmp_path / 'a' / 'results.json').unlink()
    (tmp_path / 'a' / 'checkpoints' / 'checkpoint-0003.pt').unlink()
    result = run_here(*args, '--log-with', 'tensorboard')
    assert result.returncode == 0, result.stderr
    assert [step for step, _ in told(tmp_path / 'a')['eval_top1']] == [2]


def test_a_tracker_that_is_not_there_is_named(toy_flags, tmp_path, monkeypatch):
    monkeypatch.setattr('harness.tracking.get_available_trackers', list)
    said = refused('train.py', *toy_flags, '--output', tmp_path, '--log-with', 'wandb')
    assert '--log-with wandb: it is not installed; pip install wandb' in said
    assert not list(tmp_path.iterdir())

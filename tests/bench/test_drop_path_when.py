"""--drop-path-when: the rate of each epoch, resumes, recordings and compiled blocks, and what is refused."""
import shutil

import pytest
import yaml

from harness.card import over_time_of
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_csv, read_results, refused, run_here

EARLY = ('--drop-path', '0.4', '--drop-path-when', 'early', '--drop-path-change', 'linear', '--drop-path-cutoff', '2')


def rates(folder):
    return [float(row['drop_path_rate']) for row in read_csv(folder / 'summary.csv')]


@pytest.fixture(scope='module')
def early(toy_flags, tmp_path_factory):
    output = tmp_path_factory.mktemp('output')
    result = run_here('train.py', *toy_flags, *EARLY, '--output', output, '--experiment', 'early')
    assert result.returncode == 0, result.stderr
    return output / 'early', result


def test_the_rate_of_each_epoch_is_a_column(early, finished):
    folder, result = early
    assert rates(folder) == pytest.approx([0.4, 0.2, 0.])
    assert rates(finished[0]) == [0.2] * 3  # the recipe's
    # the mean share of the rates is 1/2, and the linear rule's mean rate 0.4 (9 + 1) / (2 * 9)
    assert read_results(folder)['expected_depth'] == pytest.approx(9 - 9 * 0.5 * 0.4 * 10 / 18)
    assert 'p_L 0.6, early (before epoch 2), linear, expected depth 8.0 of 9 blocks' in result.stderr.splitlines()[0]
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert [args[f'drop_path_{key}'] for key in ('when', 'change', 'cutoff')] == ['early', 'linear', 2]
    assert over_time_of(read_results(folder)) == 'early (before epoch 2), linear'
    assert over_time_of(read_results(finished[0])) == ''


@pytest.mark.parametrize('more', [(), ('--cuda-graphs',)])
def test_a_resumed_run_is_the_undisturbed_one(early, toy_flags, tmp_path, more):
    """With recordings too: an old 1 / p_l in one would show."""
    copy = shutil.copytree(early[0], tmp_path / 'early')
    RunFolder(copy).remove_after(1)
    (copy / 'results.json').unlink()
    result = run_here('train.py', *toy_flags, *EARLY, *more, '--output', tmp_path, '--experiment', 'early',
                      '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    assert_same_run(copy, early[0])


@pytest.mark.parametrize('when', [('late', '--drop-path-cutoff', '1'), ('standard', '--drop-path-change', 'linear')])
def test_recordings_follow_rates_that_rise(toy_flags, tmp_path, when):
    for name, more in (('eager', ()), ('recorded', ('--cuda-graphs',))):
        result = run_here('train.py', *toy_flags, '--drop-path', '0.4', '--drop-path-when', *when, *more,
                          '--output', tmp_path, '--experiment', name)
        assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / 'recorded', tmp_path / 'eager')
    assert rates(tmp_path / 'eager')[-1] == 0.4
    assert rates(tmp_path / 'eager')[0] < 0.2


@pytest.mark.parametrize(('model', 'mode'), [('convnext_atto', 'batch'), ('convnext_atto', 'subset'),
                                             ('sd_resnet20_cifar', 'sample')])
def test_other_networks_and_modes(toy_flags, tmp_path, model, mode):
    result = run_here('train.py', *toy_flags, '--model', model, '--model-kwargs', '--img-size', '32',
                      '--drop-path-scale', 'train', '--drop-path-mode', mode, *EARLY, '--output', tmp_path,
                      '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert rates(tmp_path / 'a') == pytest.approx([0.4, 0.2, 0.])


def test_a_run_that_an_older_version_began_gets_the_column(finished, toy_flags, tmp_path, monkeypatch):
    copy = shutil.copytree(finished[0], tmp_path / 'finished')
    folder = RunFolder(copy)
    folder.remove_after(2)
    (copy / 'results.json').unlink()
    args = yaml.safe_load((copy / 'args.yaml').read_text())
    for key in ('when', 'change', 'cutoff'):
        del args[f'drop_path_{key}']
    (copy / 'args.yaml').write_text(yaml.safe_dump(args))
    load = RunFolder.load_checkpoint

    def without_the_column(self, use):
        def old(checkpoint):
            for row in checkpoint['rows']:
                del row['drop_path_rate']
            return use(checkpoint)
        return load(self, old)
    monkeypatch.setattr(RunFolder, 'load_checkpoint', without_the_column)
    result = run_here('train.py', *toy_flags, '--output', tmp_path, '--experiment', 'finished', '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    assert_same_run(copy, finished[0])


@pytest.mark.parametrize(('flags', 'words'), [
    (('--drop-path-when', 'early', '--drop-path-cutoff', '3'), 'drop_path_cutoff is 3, and the training ends after 3'),
    (('--drop-path-when', 'early'), 'drop_path_cutoff is None'),
    (('--drop-path-cutoff', '1'), "drop_path_when 'standard' has none"),
    (('--drop-path-when', 'late', '--drop-path-cutoff', '1', '--drop-path', '0'),
     "drop_path_when is 'late', drop_path_change 'constant', but all drop path rates are 0"),
    (('--drop-path-change', 'linear', '--model', 'convnext_atto', '--drop-path', '0', '--drop-path-scale', 'train',
      '--img-size', '32'),
     'block of the network is dropped; give a --drop-path above 0'),
    (('--drop-path-when', 'late', '--drop-path-cutoff', '0'), '0 must lie in [1, inf)'),
    (('--drop-path-when', 'never'), "invalid choice: 'never'"),
])
def test_what_can_not_be_is_one_line(toy_flags, tmp_path, flags, words):
    assert words in refused('train.py', *toy_flags, *flags, '--output', tmp_path / 'output')
    assert not (tmp_path / 'output').exists()

"""Which weights a run keeps: those that are best on the validation images, and the test images have no say."""
import pytest
import torch

from harness import engine, training
from harness.run_folder import RunFolder
from support.commands import assert_same_run, read_results, run_here, summary, weights
from support.data import write_classes


@pytest.fixture
def evaluations(monkeypatch):
    """Looks at every evaluation, and decides what is found on the validation images.

    Returns:
        `top1`, the accuracies to find in turn, none for the true ones; and `seen`, of each evaluation the number of
        images, of updates before, and the weights.
    """
    class Evaluations:
        top1, seen = [], []

    updates, evaluate, update = [], training.evaluate, engine.TrainStep.update

    def watched(model, batches, accelerator, amp, *see_batch):
        found = evaluate(model, batches, accelerator, amp, *see_batch)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ours.seen.append((batches.images, len(updates), state))
        return dict(found, top1=ours.top1.pop(0)) if ours.top1 else found

    def counted(step):
        update(step)
        updates.append(step)

    ours = Evaluations()
    monkeypatch.setattr(training, 'evaluate', watched)
    monkeypatch.setattr(engine.TrainStep, 'update', counted)
    return ours


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(('top1', 'best'), [([30., 20., 10.], 0), ([10., 30., 20.], 1), ([10., 30., 30.], 1),
                                            ([10., 20., 30.], 2), ([0., 0., 0.], 0)])
def test_the_best_epoch_is_the_first_of_the_highest_accuracy(toy_flags, tmp_path, evaluations, top1, best):
    evaluations.top1 = list(top1)
    assert run_here('train.py', *toy_flags, '--output', tmp_path, '--experiment', 'a').returncode == 0
    assert [seen[:2] for seen in evaluations.seen] == [(12, 5), (12, 10), (12, 15), (20, 15), (20, 15)]
    assert same(weights(tmp_path / 'a'), evaluations.seen[best][2])
    results = read_results(tmp_path / 'a')
    assert results['best_epoch'] == best
    assert (results['val_top1_err'], results['val_top1_err_last']) == (100 - top1[best], 100 - top1[-1])
    assert same(evaluations.seen[3][2], evaluations.seen[2][2])  # the last epoch's are tested, then the best
    assert same(evaluations.seen[4][2], evaluations.seen[best][2])


def test_validation_within_an_epoch_selects(toy_flags, tmp_path, evaluations):
    plain = [*toy_flags, '--epochs', '1', '--output', tmp_path, '--experiment']
    assert run_here('train.py', *plain, 'plain').returncode == 0
    evaluations.seen.clear()
    evaluations.top1 = [40., 60., 50.]
    assert run_here('train.py', *plain, 'often', '--eval-interval', '2').returncode == 0
    assert [(images, updates - 5) for images, updates, _ in evaluations.seen] == [  # five were the plain run's
        (12, 2), (12, 4), (12, 5), (20, 5), (20, 5)]
    assert same(weights(tmp_path / 'often'), evaluations.seen[1][2])
    results = read_results(tmp_path / 'often')
    assert (results['best_epoch'], results['val_top1_err'], results['val_top1_err_last']) == (0, 40., 50.)
    assert results['test_last'] == read_results(tmp_path / 'plain')['test_last']  # looking changes nothing


@pytest.mark.parametrize(('flags', 'top1', 'best', 'files'), [
    ([], [10., 20., 40., 30., 20.], 2, 'best-0002 best-0003 checkpoint-0004 checkpoint-0005'),
    ([], [40., 30., 20., 30., 40.], 0, 'best-0001 checkpoint-0004 checkpoint-0005'),
    ([], [10., 20., 30., 40., 50.], 4, 'best-0002 best-0004 best-0005 checkpoint-0004 checkpoint-0005'),
    # within an epoch and at its end
    (['--eval-interval', '3'], [10., 20., 30., 20., 60., 50., 20., 20., 20., 20.], 4,
     'best-0002 best-0003 checkpoint-0004 checkpoint-0005'),
    (['--eval-interval', '3'], [10., 20., 10., 20., 50., 60., 20., 20., 20., 20.], 5,
     'best-0001 best-0003 checkpoint-0004 checkpoint-0005'),
    (['--val-split', 'test'], [50., 40., 30., 20., 10.], 4,
     'best-0002 best-0004 best-0005 checkpoint-0004 checkpoint-0005')])
def test_the_best_weights_between_checkpoints(toy_flags, tmp_path, evaluations, flags, top1, best, files):
    """A checkpoint after every second epoch of five, and after the last: the best weights of then go with it."""
    evaluations.top1 = list(top1)
    result = run_here('train.py', *toy_flags, '--epochs', '5', '--checkpoint-interval', '2', *flags,
                      '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert same(weights(tmp_path / 'a'), evaluations.seen[best][2])
    assert same(evaluations.seen[-1][2], evaluations.seen[best][2])
    results = read_results(tmp_path / 'a')
    assert results['best_epoch'] == best * 5 // len(top1)
    assert results['val_top1_err'] == 100 - top1[best]
    assert sorted(path.name.partition('.')[0] for path in (tmp_path / 'a' / 'checkpoints').glob('*-*')) == files.split()


def test_the_best_weights_of_the_checkpoint_before_a_damaged_one(toy_flags, tmp_path, evaluations):
    """The fifth epoch's were better; in its second training they are worse than the third's."""
    args = [*toy_flags, '--epochs', '5', '--checkpoint-interval', '2', '--output', tmp_path, '--experiment', 'a']
    evaluations.top1 = [10., 20., 30., 20., 40.]
    assert run_here('train.py', *args).returncode == 0
    checkpoints = tmp_path / 'a' / 'checkpoints'
    (checkpoints / 'checkpoint-0005.pt').write_bytes(b'damaged')
    (tmp_path / 'a' / 'results.json').unlink()
    evaluations.top1 = [20.]
    result = run_here('train.py', *args, '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    assert 'checkpoint-0005.pt is damaged' in result.stderr
    assert same(weights(tmp_path / 'a'), evaluations.seen[2][2])
    assert read_results(tmp_path / 'a')['best_epoch'] == 2
    assert sorted(path.name.partition('.')[0] for path in checkpoints.glob('best-*')) == ['best-0002', 'best-0003']


def test_a_validation_split_that_is_the_test_split_selects_nothing(toy_flags, tmp_path, evaluations):
    evaluations.top1 = [30., 20., 10.]
    result = run_here('train.py', *toy_flags, '--val-split', 'test', '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert same(weights(tmp_path / 'a'), evaluations.seen[2][2])
    results = read_results(tmp_path / 'a')
    assert results['best_epoch'] == 2
    assert results['images'] == dict(train=48, val=20, test=20)
    assert results['held_out'] == 'nothing: the last epoch counts'
    assert results['test_best'] == results['test_last']


def test_test_images_change_nothing_but_the_test_error(toy_flags, finished, tmp_path):
    """Others are tested, in number and contents: the validation images are still the same ones, and what they say."""
    folder = write_classes(tmp_path / 'other', train=12, test=7)
    args = [*toy_flags, '--data-dir', folder, '--output', tmp_path, '--experiment', 'a']
    assert run_here('train.py', *args).returncode == 0
    assert_same_run(tmp_path / 'a', finished[0])
    ours, theirs = read_results(tmp_path / 'a'), read_results(finished[0])
    assert (ours['best_epoch'], ours['val_top1_err']) == (theirs['best_epoch'], theirs['val_top1_err'])
    assert ours['images']['test'] == 28
    assert ours['test_last']['loss'] != theirs['test_last']['loss']


def test_a_resumed_run_remembers_the_best_so_far(toy_flags, tmp_path, evaluations):
    args = [*toy_flags, '--output', tmp_path, '--experiment', 'a']
    evaluations.top1 = [30., 20., 10.]
    assert run_here('train.py', *args).returncode == 0
    first, whole = evaluations.seen[0][2], summary(tmp_path / 'a')
    RunFolder(tmp_path / 'a').remove_after(2)
    (tmp_path / 'a' / 'results.json').unlink()
    evaluations.top1 = [10.]
    assert run_here('train.py', *args, '--resume', 'auto').returncode == 0
    assert summary(tmp_path / 'a') == whole
    assert same(weights(tmp_path / 'a'), first)
    assert read_results(tmp_path / 'a')['best_epoch'] == 0

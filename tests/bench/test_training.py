"""bench/train.py to its end: the run folder, what it says, learning rates, gradients, precision and time."""
import json
import re
import statistics

import pytest
import safetensors
import timm
import torch
import yaml
from torch import nn

import timm_sd
from harness import engine, launch, training
from harness.errors import UserError
from harness.machine import hardware
from harness.network import DepthSettings, NetworkSettings, build_network, first_branch_weight
from harness.results import closing_lines
from harness.run_folder import COLUMNS, RunFolder
from support.commands import assert_same_run, read_csv, read_results, run_here, summary, weights
from support.runs import KEPT


def before_each_update(monkeypatch, look):
    """Calls `look(step)` whenever the gradient of an update is there."""
    update = engine.TrainStep.update
    monkeypatch.setattr(engine.TrainStep, 'update', lambda step: look(step) or update(step))


def test_run_folder_is_complete(finished):
    folder, result = finished
    assert {path.name for path in folder.iterdir()} == {
        'args.yaml', 'summary.csv', 'results.json', 'model.safetensors', 'curves.png', 'samples.png', 'mistakes.png',
        'checkpoints'}
    rows, results = read_csv(folder / 'summary.csv'), read_results(folder)
    assert list(rows[0]) == ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr', 'train_seconds',
                             'drop_path_rate']
    assert results['test_best'].keys() == results['test_last'].keys() == {'loss', 'top1_err', 'top5_err'}
    assert [row['epoch'] for row in rows] == ['0', '1', '2']
    assert json.loads(result.stdout) == dict(run_folder=str(folder), **results)
    best = max(rows, key=lambda row: float(row['eval_top1']))
    assert results['best_epoch'] == int(best['epoch'])
    assert results['val_top1_err'] == pytest.approx(100 - float(best['eval_top1']), abs=1e-4)
    assert results['val_top1_err_last'] == pytest.approx(100 - float(rows[-1]['eval_top1']), abs=1e-4)
    assert results['images'] == dict(train=36, val=12, test=20)
    assert results['label_names'] == ['class 0', 'class 1', 'class 2', 'class 3']
    assert (results['blocks'], results['drop_path_rate']) == (9, 0.2)
    assert results['expected_depth'] == pytest.approx(8)  # the mean of the linear rule is 1 - 0.2 (9 + 1) / (2 * 9)
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (args['epochs'], args['batch_size'], args['drop_path_scale']) == (3, 8, 'eval')
    header = result.stderr.splitlines()[0]
    assert all(word in header for word in (
        'cpu (1 threads)', 'fp32', '1 process x batch 8', 'sd_resnet20_cifar', 'toy0 36/12/20', 'p_L 0.8',
        'expected depth 8.0 of 9', str(folder)))


def test_weights_are_a_plain_network_with_their_origin(finished):
    folder, _ = finished
    assert weights(folder).keys() == timm.create_model('sd_resnet20_cifar', drop_path_rate=0.).state_dict().keys()
    with safetensors.safe_open(folder / 'model.safetensors', 'pt') as file:
        metadata = file.metadata()
    results = read_results(folder)
    assert metadata['model'] == 'sd_resnet20_cifar'
    assert metadata['recipe'] == 'quickstart'
    assert metadata['img_size'] == '8'
    assert json.loads(metadata['mean']) == [0.31] * 3
    assert json.loads(metadata['changed_from_recipe'])['val_per_class'] == [3]
    assert int(metadata['selected_epoch']) == results['best_epoch']
    assert float(metadata['test_top1_err']) == results['test_best']['top1_err']


def test_it_ends_with_three_lines_for_a_person_and_a_json_for_scripts(finished, toy_flags):
    folder, result = finished
    lines = result.stderr.splitlines()[-3:]
    assert '\n'.join(lines) == closing_lines(RunFolder(folder), read_results(folder))
    again = [*toy_flags, '--output', folder.parent, '--experiment', folder.name, '--resume', 'auto']
    said = run_here('train.py', *again)  # complete: says so at once
    assert (said.returncode, said.stdout) == (0, result.stdout)
    assert said.stderr.splitlines() == lines
    seen = run_here('train.py', *again, terminal=True)
    assert (seen.returncode, seen.stdout) == (0, '')
    assert seen.stderr.splitlines() == lines


def test_closing_lines_are_the_folder_the_errors_and_the_time(tmp_path):
    """Epochs count from one there."""
    RunFolder(tmp_path).write_summary(
        [dict(dict.fromkeys(COLUMNS, 0.), train_seconds=seconds) for seconds in (30.3, 4.5)])
    folder, error, seconds = closing_lines(RunFolder(tmp_path), dict(
        test_best=dict(top1_err=5.254), test_last=dict(top1_err=5.5), best_epoch=6, epochs=10, epoch_seconds=3.26,
        images_per_second=812.3)).splitlines()
    assert folder == f'run folder  {tmp_path}'
    assert error.startswith('test error  ')
    assert re.findall(r'[0-9.]+', error) == ['5.25', '7', '5.50', '10']
    assert seconds.startswith('time        ')
    assert re.findall(r'[0-9.]+', seconds) == ['35', '3.3', '812']


def test_a_run_of_an_older_version_is_told_too():
    """Its results.json may lack what was added since."""
    folder = KEPT / 'cifar10_16_epochs_scale_eval'
    _, error, seconds = closing_lines(RunFolder(folder), read_results(folder)).splitlines()
    assert re.findall(r'[0-9.]+', error) == ['24.66', '14', '24.65', '16']
    total = sum(float(row['train_seconds']) for row in read_csv(folder / 'summary.csv'))
    assert re.findall(r'[0-9.]+', seconds)[0] == f'{total:.0f}'


def test_learning_rate_of_every_update(toy_flags, tmp_path, monkeypatch):
    """The quickstart's: a climb of one epoch, then a straight line that would reach zero behind the last update."""
    rates = []
    before_each_update(monkeypatch, lambda step: rates.append(step.optimizer.param_groups[0]['lr']))
    assert run_here('train.py', *toy_flags, '--output', tmp_path).returncode == 0
    climb = [1e-5 + update / 5 * (0.1 - 1e-5) for update in range(5)]
    assert rates == pytest.approx([*climb, *(0.1 * (1 - update / 15) for update in range(5, 15))])


def test_learning_rate_falls_at_its_milestone(toy_flags, tmp_path, monkeypatch):
    rates = []
    before_each_update(monkeypatch, lambda step: rates.append(step.optimizer.param_groups[0]['lr']))
    result = run_here('train.py', *toy_flags, '--sched', 'multistep', '--no-sched-on-updates', '--warmup-epochs', '0',
                      '--lr', '0.2', '--decay-milestones', '2', '--decay-rate', '0.1', '--output', tmp_path,
                      '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert rates == pytest.approx([0.2] * 5 + [0.02] * 10)
    assert [float(row['lr']) for row in read_csv(tmp_path / 'a' / 'summary.csv')] == pytest.approx([0.2, 0.02, 0.02])


def test_gradients_of_the_first_convolution_are_logged(toy_flags, tmp_path, monkeypatch):
    gradients = []
    args = [*toy_flags, '--epochs', '1', '--drop-path', '0', '--output', tmp_path, '--experiment']
    assert run_here('train.py', *args, 'plain').returncode == 0
    before_each_update(monkeypatch, lambda step: gradients.append(step.model.layer1[0].conv1.weight.grad.clone()))
    result = run_here('train.py', *args, 'logged', '--log-gradients')
    assert result.returncode == 0, result.stderr
    logged = float(read_csv(tmp_path / 'logged' / 'summary.csv')[0]['grad_magnitude'])
    assert len(gradients) == 5
    assert 0 < logged == pytest.approx(statistics.fmean(grad.abs().mean().item() for grad in gradients))
    ours, theirs = weights(tmp_path / 'logged'), weights(tmp_path / 'plain')
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # looking changes nothing
    with pytest.raises(UserError, match='no residual block'):
        first_branch_weight(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_seed_decides_everything(finished, toy_flags, tmp_path):
    torch.manual_seed(123)  # whatever the process drew before
    for seed in (0, 1):
        args = [*toy_flags, '--seed', seed, '--output', tmp_path, '--experiment', f'seed{seed}']
        assert run_here('train.py', *args).returncode == 0
    assert_same_run(tmp_path / 'seed0', finished[0])
    assert summary(tmp_path / 'seed1') != summary(finished[0])


def test_each_epoch_has_an_order_and_gates_of_its_own(toy_flags, tmp_path, monkeypatch):
    """The toy_flags's 36 images, nine of each class; each forward pass of five leaves the gates it drew."""
    steps, backward = [], engine.TrainStep.backward

    def watched(step, x, target, images, is_update):
        loss = backward(step, x, target, images, is_update)
        steps.append((target.tolist(), tuple(timm_sd.depth_gates(step.model).open)))
        return loss

    monkeypatch.setattr(engine.TrainStep, 'backward', watched)
    assert run_here('train.py', *toy_flags, '--drop-path', '0.5', '--output', tmp_path).returncode == 0
    epochs = [steps[:5], steps[5:10], steps[10:]]
    orders = [tuple(sum((target for target, _ in epoch), [])) for epoch in epochs]
    assert [sorted(order) for order in orders] == [[0] * 9 + [1] * 9 + [2] * 9 + [3] * 9] * 3
    assert len(set(orders)) == 3
    assert len({tuple(gates for _, gates in epoch) for epoch in epochs}) == 3


def test_trains_and_validates_in_bf16_but_tests_in_fp32(toy_flags, tmp_path, monkeypatch):
    seen, evaluate = [], training.evaluate

    def watched(model, batches, accelerator, amp, *see_batch):
        with amp():
            seen.append((batches.images, torch.is_autocast_enabled('cpu') and torch.get_autocast_dtype('cpu')))
        return evaluate(model, batches, accelerator, amp, *see_batch)

    monkeypatch.setattr(training, 'evaluate', watched)
    result = run_here('train.py', *toy_flags, '--epochs', '1', '--amp', '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert 'bf16' in result.stderr.splitlines()[0]
    assert seen == [(12, torch.bfloat16), (20, False), (20, False)]  # val, then test by the last weights and the best
    assert read_results(tmp_path / 'a')['hardware']['amp'] is True
    assert 'amp' not in read_results(tmp_path / 'a')['changed_from_recipe']


@pytest.mark.parametrize('elsewhere', [False, True])
def test_the_time_is_that_of_where_the_run_ended(toy_flags, tmp_path, elsewhere):
    """Two epochs that took 1000 and 2000 s, here or on another machine, and a third one here."""
    args = [*toy_flags, '--output', tmp_path, '--experiment', 'a']
    assert run_here('train.py', *args).returncode == 0
    folder = RunFolder(tmp_path / 'a')
    folder.remove_after(2)
    (tmp_path / 'a' / 'results.json').unlink()
    state = folder.load_checkpoint()
    assert state['epoch'] == 2
    for row, place, seconds in zip(state['rows'], state['hardware'], (1000., 2000.), strict=True):
        row['train_seconds'] = seconds
        place['threads'] += elsewhere
    folder.save_checkpoint(state, history=2)
    result = run_here('train.py', *args, '--resume', 'auto')
    assert result.returncode == 0, result.stderr
    results, last = read_results(tmp_path / 'a'), float(read_csv(tmp_path / 'a' / 'summary.csv')[-1]['train_seconds'])
    assert results['hardware']['threads'] == 1
    expected = last if elsewhere else 1000.  # the only one, or the median of three
    assert results['epoch_seconds'] == round(expected, 2)
    assert results['images_per_second'] == pytest.approx(36 / expected, abs=0.05)
    assert f'time        {3000 + last:.0f} s of training' in result.stderr  # wherever they were


@pytest.mark.parametrize(('processes', 'asked', 'expected'), [(1, None, 6), (3, None, 2), (8, None, 1), (3, 5, 5)])
def test_processes_of_a_machine_share_its_cores(monkeypatch, processes, asked, expected):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
    monkeypatch.setattr(launch, 'cores', lambda: 6)
    before = torch.get_num_threads()
    try:
        accelerator = launch.join_processes(launch.LaunchSettings(threads=asked))
        assert hardware(accelerator, amp=False)['threads'] == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('architecture', ['sd_resnet20_cifar', 'resnet10t'])
def test_a_network_by_its_folder_has_the_method_too(tmp_path, architecture):
    (tmp_path / 'config.json').write_text(json.dumps(dict(
        architecture=architecture, num_classes=10, pretrained_cfg=dict(num_classes=10))))
    model = build_network(NetworkSettings(model=f'local-dir:{tmp_path}'), DepthSettings(drop_path=0.25), 10, seed=7)
    gates = timm_sd.depth_gates(model)
    assert (gates.drop_path_rates[-1], gates.seed) == (0.25, 7)

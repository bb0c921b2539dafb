"""Command lines: a mistake is one line and status 2, and every flag is a field of one settings class."""
import dataclasses
import re
import signal
import subprocess
from pathlib import Path

import pytest

from harness.cli import finite, run_script
from harness.errors import RankError, UserError
from harness.network import NetworkSettings
from harness.recipes import command_line, group_flags, parse_train_flags, read_recipe
from support.commands import BENCH, command, refused, run_here
from support.waiting import hear_sigint, wait_until

# Each flag of train.py with a value that is neither its default nor that of the recipe.
VALUES = dict(
    config='cifar10', dataset='some/data', dataset_config='plain', data_dir='folder', fingerprint='abc', streaming=True,
    input_key='picture', target_key='kind', train_split='train+extra', val_split='dev', test_split='held',
    val_per_class=[3, 4], val_fraction=0.2, epoch_size=99, num_classes=7, img_size=24, mean=[0.1, 0.2, 0.3],
    std=[0.4, 0.5, 0.6], batch_size=5,
    validation_batch_size=14, model='sd_resnet20_cifar', pretrained=True, initial_checkpoint='file',
    drop=0.125, sync_bn=True, amp_dtype='float16', model_kwargs=dict(a=1, b=[2], c='x'), amp=True,
    channels_last=False, drop_path=0.25, drop_path_schedule='uniform',
    drop_path_mode='sample', drop_path_scale='train', drop_path_when='late', drop_path_change='linear',
    drop_path_cutoff=2, grad_checkpointing=True, compile='model',
    torchcompile_mode='default', opt='adam', lr=0.3, momentum=0.8, weight_decay=0.01, filter_bias_and_bn=True,
    opt_eps=1e-7, opt_betas=[0.7, 0.9], opt_kwargs=dict(d=1), layer_decay=0.7, clip_grad=2., clip_mode='agc',
    warmup_prefix=True, cooldown_epochs=4, reprob=0.15, remode='rand', recount=3, mixup=0.35, cutmix=0.45,
    mixup_prob=0.55, mixup_switch_prob=0.65, mixup_off_epoch=21, vflip=0.02, bce_loss=True, bce_target_thresh=0.22,
    model_ema=True, model_ema_decay=0.91, model_ema_warmup=True, log_with=['tensorboard'],
    epochs=9, sched='cosine', sched_on_updates=True,
    decay_milestones=[2, 3, 4], decay_rate=0.5, min_lr=0.01, warmup_epochs=2, warmup_lr=0.02, warmup_constant=True,
    hflip=0.25, seed=11, grad_accum_steps=2,
    smoothing=0.1, eval_interval=6, log_gradients=True, cuda_graphs=True, log_interval=13, checkpoint_interval=15,
    checkpoint_hist=4, output='elsewhere', experiment='name', resume='auto', require_processes=2, timeout=600,
    threads=8)
# What has an effect with other values of in_memory and aug.
IN_MEMORY, IN_FILES = dict(crop_padding=1), dict(
    in_memory=False, workers=3, scale=[0.5, 0.75], ratio=[0.7, 1.5], color_jitter=0.1, aa='rand-m9',
    train_interpolation='bicubic')


def parts(args):
    """The settings of each part of train.py."""
    flags = group_flags(args)
    assert flags.record == vars(args)
    return [value for name, value in vars(flags).items() if name != 'record']


@pytest.mark.parametrize('path', [IN_MEMORY, IN_FILES])
def test_every_flag_comes_back_in_one_settings_class_as_it_was_said(path):
    values, (unsaid,) = {**VALUES, **path}, [other for other in (IN_MEMORY, IN_FILES) if other is not path]
    args = parse_train_flags(command_line(values))
    flags = {key: value for key, value in vars(args).items() if key in values}
    assert flags == values
    assert vars(args).keys() - flags.keys() == {'aug'} | unsaid.keys() - path.keys()
    assert {key: type(value) for key, value in flags.items()} == {key: type(value) for key, value in values.items()}
    found = [pair for part in parts(args) for pair in dataclasses.asdict(part).items()]
    assert sorted(key for key, _ in found) == sorted(vars(args))  # none twice
    assert dict(found) == vars(args)


def test_what_nobody_says_is_the_default_of_its_class():
    args, recipe = parse_train_flags(['-c', 'cifar10']), read_recipe('cifar10')
    assert all(vars(args)[name] != value for name, value in {**VALUES, **IN_MEMORY, **IN_FILES}.items()
               if name != 'config')
    defaults = {name: value for part in parts(args) for name, value in dataclasses.asdict(type(part)()).items()}
    assert vars(args) == dict(defaults, **recipe, config='cifar10')
    assert NetworkSettings().model_kwargs is not NetworkSettings().model_kwargs  # a default isn't shared


@pytest.mark.parametrize(('args', 'words'), [
    (['--model', 'sd_resnet111_cifar'], ['sd_resnet111_cifar', 'sd_resnet110_cifar']),
    (['-c', 'cifar11'], ['cifar11', 'cifar10']),
    (['--dataset', './nowhere'], ['./nowhere', 'does not exist']),
    (['--drop-path', '1.0'], ['1.0', '[0, 1)']),
    (['--drop-path', '-0.1'], ['-0.1', '[0, 1)']),
    (['--img-sise', '16'], ['--img-sise']),
    (['--epochs', '0'], ['--epochs', '0']),
    (['--epochs', '1.5'], ['--epochs', '1.5']),
    (['--hflip', '1.5'], ['--hflip', '1.5', '[0, 1]']),
    (['--model-kwargs', 'foo'], ['--model-kwargs', 'foo', 'key=value']),
    (['--model-kwargs', 'foo=['], ['--model-kwargs', 'foo=[', 'no YAML']),
    (['--lr', 'inf'], ['--lr', 'inf', '[0, inf)']),
    (['--lr', 'nan'], ['--lr', 'nan', '[0, inf)']),
    (['--weight-decay', 'inf'], ['--weight-decay', 'inf']),
    (['--weight-decay', '1e999'], ['--weight-decay', '1e999']),
    (['--color-jitter', 'infinity'], ['--color-jitter', 'infinity']),
    (['--smoothing', 'nan'], ['--smoothing', 'nan', '[0, 1]']),
    (['--drop-path', 'nan'], ['--drop-path', 'nan', '[0, 1)']),
    (['--mean', '0.5', 'nan', '0.5'], ['--mean', 'nan', '(-inf, inf)']),
    (['--mean=-inf'], ['--mean', '-inf', '(-inf, inf)']),
    (['--std', '0.5', 'inf', '0.5'], ['--std', 'inf']),
    (['--decay-milestones', '250', '250'], ['--decay-milestones 250 250', 'must rise']),
    (['--decay-milestones', '375', '250'], ['--decay-milestones 375 250', 'must rise']),
    (['--decay-milestones', '1', '2', '2', '3'], ['--decay-milestones 1 2 2 3', 'must rise']),
    (['--sched', 'plateau'], ['--sched', 'plateau', 'multistep']),
    (['--require-processes', '2'], ['--require-processes is 2', '1 process', 'README']),
])
def test_mistakes_in_flags_get_one_line_and_status_2(tmp_path, args, words):
    said = refused('train.py', '--output', tmp_path / 'output', *args)
    assert all(word in said for word in words)
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize(('args', 'words'), [
    (['--num-classes', '7'], ['--num-classes', '7', '4']),
    (['--opt', 'foo'], ['--opt', 'foo']),
    (['--mean', '0.5'], ['--mean', '0.5']),
    (['--std', '0.5', '0.5', '0'], ['--std', 'above 0']),
    (['--model-kwargs', 'foo=1'], ['sd_resnet20_cifar', 'foo']),
    (['--output', '/proc/nowhere'], ['/proc/nowhere', '--output']),
    (['--pretrained', '--model', 'sd_resnet20_cifar.svhn'], ['sd_resnet20_cifar.svhn']),
    (['--pretrained', '--model', 'sd_resnet20_cifar.c11'], ['c11']),
    (['--resume', './nowhere'], ['./nowhere', 'args.yaml']),
    (['--val-per-class', '1000'], ['--val-per-class', '1000']),
    (['--val-per-class', '1', '2'], ['--val-per-class', 'wants 1']),
    (['--test-split', 'dev'], ['dev', 'train, test']),
    (['--model', 'resnet10t', '--drop-path', '0', '--compile', 'blocks'], ['resnet10t', 'compile the whole model']),
    (['--compile', 'blocks', '--torchcompile-mode', 'fast'], ['fast', 'reduce-overhead']),
])
def test_mistakes_that_data_or_network_show_get_one_line_and_status_2(toy_flags, tmp_path, args, words):
    said = refused('train.py', *toy_flags, '--output', tmp_path / 'output', *args)
    assert all(word in said for word in words)
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize('text', ['0', '-1.5', '1e308'])
def test_numbers_that_are_finite_are_taken(text):
    assert finite(text) == float(text)
    assert parse_train_flags(['--mean', text, text, text]).mean == [float(text)] * 3


def test_images_of_another_size_need_img_size(toy_flags, tmp_path):
    at = toy_flags.index('--img-size')
    said = refused('train.py', *toy_flags[:at], *toy_flags[at + 2:], '-c', 'cifar10', '--output', tmp_path / 'output')
    assert '8x8 px' in said
    assert '--img-size 32' in said


def test_a_loss_that_is_no_number_ends_the_run_with_the_way_out(toy_flags, tmp_path):
    result = run_here('train.py', *toy_flags, '--epochs', '1', '--sched', 'constant', '--warmup-epochs', '0', '--lr',
                      '1e30', '--output', tmp_path, '--experiment', 'a')
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith('train.py: error: the loss of epoch 1 is ')
    assert '--lr 1e+30' in last
    assert not list(tmp_path.rglob('checkpoint-*'))


def test_a_rank_reports_its_own_errors(monkeypatch, capsys):
    monkeypatch.setenv('LOCAL_RANK', '1')
    for kind, lines in ((RankError, 1), (UserError, 0)):
        def main(kind=kind):
            raise kind('bad.png is damaged')
        with pytest.raises(SystemExit, match='2'):
            run_script(main)
        assert capsys.readouterr().err.count('bad.png is damaged\n') == lines


def test_a_password_of_the_hubs_address_is_not_printed(monkeypatch, capsys):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', 'http://me:tiptop@hub')

    def main():
        raise UserError('look at http://me:tiptop@hub/our/sd')
    with pytest.raises(SystemExit):
        run_script(main)
    assert 'look at http://me:***@hub/our/sd' in capsys.readouterr().err


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    (mask,) = re.findall(r'SigCgt:\s+(\w+)', Path(f'/proc/{pid}/status').read_text())
    return int(mask, 16) >> (number - 1) & 1


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize('script', [path.name for path in BENCH.glob('*.py')])
def test_a_signal_during_the_imports_is_one_line(script, number, status):
    with subprocess.Popen(command(script, '--help'), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          preexec_fn=hear_sigint) as process:
        try:
            wait_until(lambda: catches(process.pid, signal.SIGTERM), process=process)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, stdout) == (status, '')
    assert stderr == f'{script}: stopped by {signal.Signals(number).name}; to go on, run the same line again\n'

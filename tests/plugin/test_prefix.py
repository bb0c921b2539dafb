"""python -m timm_sd: what it changes in timm, within this process; test_timm_scripts.py runs timm's own scripts."""
import subprocess
import sys

import pytest
import timm
import timm.models._factory
import timm.scheduler.scheduler_factory
import timm.utils
import torch
from timm.layers import DropPath
from timm.models import create_model as models_create_model
from timm.models._factory import create_model as factory_create_model
from timm.scheduler.plateau_lr import PlateauLRScheduler
from timm.scheduler.scheduler import Scheduler

import timm_sd
import timm_sd.prefix
from timm_sd.compute import computed_share
from timm_sd.prefix import Prefix

PATCHED = [(timm.models._factory, 'model_entrypoint'), (timm.utils, 'random_seed'), (timm.utils.random, 'random_seed'),
           (timm.scheduler, 'create_scheduler_v2'), (timm.scheduler.scheduler_factory, 'create_scheduler_v2'),
           *((cls, name) for cls in (Scheduler, PlateauLRScheduler) for name in ('step', 'step_update'))]


@pytest.fixture
def prefix(monkeypatch):
    """Installs a prefix with these flags until the test ends."""
    for place, name in PATCHED:
        monkeypatch.setattr(place, name, getattr(place, name))

    def install(mode='batch', **flags):
        installed = Prefix(mode, **flags)
        installed.install()
        return installed
    return install


def small(create=timm.create_model, name='test_resnet', **kwargs):
    return create(name, num_classes=3, pretrained_cfg_overlay=dict(input_size=(3, 64, 64)), **kwargs)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


# --- networks


@pytest.mark.parametrize('create', [timm.create_model, models_create_model, factory_create_model])
def test_create_model_by_any_name_gives_gates(prefix, create, capsys):
    prefix('subset', schedule='uniform', scale='train')
    model = small(create, drop_path_rate=0.3)
    gates = timm_sd.depth_gates(model)
    assert (list(gates.drop_path_rates), gates.mode, gates.scale) == ([0.3] * 4, 'subset', 'train')
    assert not any(type(module) is DropPath for module in model.modules())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('timm_sd: test_resnet: 4 residual blocks have gates, layer1.0 to layer4.0: mode subset')
    assert line.endswith('a training step runs 84% of the multiplications')


@pytest.mark.parametrize(('flags', 'expected'), [
    (dict(mode='batch'), ('batch', 'linear', 'train')),
    (dict(mode=None, schedule='uniform'), ('batch', 'uniform', 'train')),
    (dict(mode=None, scale='eval'), ('batch', 'linear', 'eval')),
])
def test_one_flag_is_enough(prefix, flags, expected):
    prefix(**flags)
    gates = timm_sd.depth_gates(small(drop_path_rate=0.3))
    assert (gates.mode, gates.schedule, gates.scale) == expected


def test_the_rate_may_stand_in_a_config(prefix, tmp_path):
    timm.models.save_for_hf(small(), str(tmp_path), model_config=dict(model_args=dict(drop_path_rate=0.2)))
    prefix()
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert timm_sd.depth_gates(model).drop_path_rates[-1] == 0.2


def test_without_flags_timms_networks_stay_timms_and_advice_is_given(prefix, capsys):
    prefix(None)
    model = small(drop_path_rate=0.3)
    assert timm_sd.depth_gates(model) is None
    assert any(type(module) is DropPath for module in model.modules())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("timm_sd: test_resnet gets timm's DropPath")
    assert '--drop-path-mode batch' in line
    small()
    assert capsys.readouterr().err == ''


def test_a_network_without_a_rate_stays_plain_and_that_is_said(prefix, capsys):
    prefix()
    for kwargs in ({}, dict(drop_path_rate=0.)):
        assert timm_sd.depth_gates(small(**kwargs)) is None
        assert 'test_resnet is created without a drop path rate' in capsys.readouterr().err


def test_our_networks_take_the_flags_which_win(prefix):
    prefix('subset', schedule='uniform')
    timm.utils.random_seed(7, 3)
    gates = timm_sd.depth_gates(timm.create_model('sd_resnet20_cifar', drop_path_rate=0.3))
    assert (gates.mode, gates.schedule, gates.scale, gates.seed) == ('subset', 'uniform', 'train', 7)
    gates = timm_sd.depth_gates(timm.create_model('sd_resnet20_cifar', drop_path_mode='batch', drop_path_seed=2))
    assert (gates.mode, gates.scale, gates.seed, gates.drop_path_rates[-1]) == ('subset', 'train', 2, 0.5)


def test_flags_win_over_what_a_config_holds(prefix, tmp_path):
    timm.models.save_for_hf(timm.create_model('sd_resnet20_cifar'), str(tmp_path), model_config=dict(
        model_args=dict(drop_path_rate=0.2, drop_path_mode='batch', drop_path_schedule='uniform')))
    prefix('subset')
    gates = timm_sd.depth_gates(timm.create_model(f'local-dir:{tmp_path}', pretrained=True))
    assert (gates.mode, gates.schedule, gates.drop_path_rates[0]) == ('subset', 'uniform', 0.2)


def test_blocks_that_stay_open_are_told_in_a_line(prefix, capsys, recwarn):
    prefix()
    timm.create_model('nf_regnet_b0', drop_path_rate=0.3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(': ')[2][:11] for line in lines] == ['NormFreeNet', '13 residual']
    assert not recwarn.list


@pytest.mark.parametrize('name', ['cait_xxs24_224', 'pit_ti_224'])
def test_networks_whose_tokens_have_no_gradient_function(prefix, capsys, name):
    prefix()
    assert timm.create_model(name, drop_path_rate=0.1).training
    assert '% of the multiplications' in capsys.readouterr().err


@pytest.mark.parametrize(('name', 'kwargs', 'words'), [
    ('vgg11', {}, 'vgg11: VGG has no residual block'),
    ('test_resnet', dict(scriptable=True), '--torchscript'),
    ('test_resnet', dict(drop_path_rate=1.5), '1.5'),
])
def test_what_can_not_be_is_one_line_and_exit_status_2(prefix, capsys, name, kwargs, words):
    prefix()
    with pytest.raises(SystemExit) as stop:
        timm.create_model(name, **{'drop_path_rate': 0.3, **kwargs})
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('timm_sd: error: ')
    assert words in line


def test_one_process_alone_speaks(prefix, capsys, monkeypatch):
    prefix()
    monkeypatch.setenv('RANK', '1')
    small(drop_path_rate=0.3)
    assert capsys.readouterr().err == ''


def test_the_share_of_multiplications_by_hand():
    model = timm.create_model('test_resnet', pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    timm_sd.add_stochastic_depth(model, 0.5, 'uniform')
    flops = {}

    def note(module, args, output):
        if isinstance(module, torch.nn.Conv2d):
            flops[module] = module.weight[0].numel() * output.numel()
        elif isinstance(module, torch.nn.Linear):
            flops[module] = module.weight.numel()
    for module in model.modules():
        module.register_forward_hook(note)
    model.eval()(torch.zeros(1, 3, 64, 64))
    in_branches = sum(count for name, module in model.named_modules() for of, count in flops.items()
                      if of is module and name.startswith('layer') and 'downsample' not in name)
    expected = 1 - 0.5 * in_branches / sum(flops.values())
    model.train()
    assert computed_share(model, timm_sd.depth_gates(model)) == pytest.approx(expected)
    assert all(module.training for module in model.modules())


# --- seed and epoch


def test_gates_have_the_scripts_seed_and_not_the_ranks(prefix):
    prefix()
    for rank in (0, 1):
        timm.utils.random_seed(5, rank)
        state = torch.get_rng_state()
        assert timm_sd.depth_gates(small(drop_path_rate=0.3)).seed == 5
        torch.manual_seed(5 + rank)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('sched', ['cosine', 'step', 'multistep', 'plateau', 'tanh', 'poly'])
def test_gates_follow_the_epoch_that_timms_scheduler_is_told(prefix, sched):
    prefix()
    model = small(drop_path_rate=0.3)
    gates = timm_sd.depth_gates(model)
    scheduler, _ = timm.scheduler.create_scheduler_v2(sgd(model), sched, 9, decay_milestones=[5], updates_per_epoch=4)
    gates.draw()
    scheduler.step(3, 0.5)
    assert (gates.epoch, gates.step) == (3, 0)
    gates.draw()
    scheduler.step_update(13)
    assert (gates.epoch, gates.step) == (3, 1)


@pytest.mark.parametrize('sched', ['cosine', 'plateau'])
def test_a_resumed_run_scheduled_by_updates_begins_with_its_epoch(prefix, sched):
    """timm calls step_update(start_epoch * updates_per_epoch), and step at the end of each epoch."""
    prefix()
    model = small(drop_path_rate=0.3)
    gates = timm_sd.depth_gates(model)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        sgd(model), sched, 9, step_on_epochs=sched == 'plateau', updates_per_epoch=4)
    scheduler.step_update(20)
    assert (gates.epoch, gates.step) == (5, 0)
    for update in range(21, 25):
        gates.draw()
        scheduler.step_update(update)
    assert (gates.epoch, gates.step) == (5, 4)
    scheduler.step(6, 0.5)
    assert (gates.epoch, gates.step) == (6, 0)


def test_a_loop_that_tells_the_epoch_that_has_ended_has_no_gates_twice(prefix):
    """As DeiT's: scheduler.step(epoch) behind the epoch."""
    prefix()
    model = small(drop_path_rate=0.3)
    gates = timm_sd.depth_gates(model)
    scheduler, _ = timm.scheduler.create_scheduler_v2(sgd(model), 'cosine', 9)
    keys = []
    for epoch in range(4):
        for _ in range(3):
            keys.append(gates._key())
            gates.draw()
        scheduler.step(epoch)
    assert len(set(keys)) == 12


# --- rates over time


@pytest.mark.parametrize('name', ['test_resnet', 'sd_resnet20_cifar'])
def test_rates_follow_the_epoch_that_timms_scheduler_is_told(prefix, capsys, name):
    prefix(None, when='early', change='linear', cutoff=4)
    model = timm.create_model(name, drop_path_rate=0.4)
    gates = timm_sd.depth_gates(model)
    with pytest.raises(RuntimeError, match='none was begun'):  # where no scheduler is made
        gates.draw()
    scheduler, epochs = timm.scheduler.create_scheduler_v2(sgd(model), 'cosine', 7, cooldown_epochs=1)
    assert 'timm_sd: drop path rates over 8 epochs: early (before epoch 4), linear' in capsys.readouterr().err
    rates = []
    for epoch in range(epochs):
        rates.append(gates.drop_path_rates[-1])
        gates.draw()
        scheduler.step(epoch + 1)
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0])
    resumed = timm_sd.depth_gates(timm.create_model(name, drop_path_rate=0.4))
    timm.scheduler.create_scheduler_v2(sgd(model), 'cosine', 7)[0].step(3)
    assert resumed.drop_path_rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(('flags', 'rate', 'sched', 'words'), [
    (dict(when='early'), 0.4, 'cosine', 'drop_path_cutoff is None'),
    (dict(when='late', cutoff=9), 0.4, 'cosine', 'drop_path_cutoff is 9, and the training ends after 7 epochs'),
    (dict(when='late', cutoff=3), 0., 'cosine', '--drop-path-when: no network has a drop path rate above 0'),
    (dict(when='late', cutoff=3), 0.4, 'none', 'the script has none'),
    (dict(when='late', cutoff=-3), 0.4, 'cosine', 'drop_path_cutoff is -3'),
    (dict(cutoff=3), 0.4, 'cosine', "drop_path_when 'standard' has none"),
])
def test_a_schedule_that_can_not_be_is_one_line(prefix, capsys, flags, rate, sched, words):
    prefix(**flags)
    with pytest.raises(SystemExit) as stop:
        timm.scheduler.create_scheduler_v2(sgd(small(drop_path_rate=rate)), sched, 7)
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith('timm_sd: error: ')
    assert words in line


def test_a_shortened_network_is_one_of_timms(prefix, tmp_path):
    for name in ('test_resnet', 'sd_resnet20_cifar'):
        model = timm_sd.shorten(timm.create_model(name), blocks=3)
        timm.models.save_for_hf(model, tmp_path / name, safe_serialization=True)
    for flags in (dict(mode=None), dict(mode='batch')):
        prefix(**flags)
        for name in ('test_resnet', 'sd_resnet20_cifar'):
            model = timm.create_model(f'local-dir:{tmp_path / name}', pretrained=True)
            assert timm_sd.depth_gates(model) is None
            assert len(timm_sd.removed_blocks(model)) in (1, 6)
    model = timm.create_model(f'local-dir:{tmp_path / "test_resnet"}', pretrained=True, drop_path_rate=0.2)
    assert len(timm_sd.depth_gates(model).open) == 3


def test_rates_of_samples_are_refused(prefix, capsys):
    prefix(None, when='early', cutoff=2)
    with pytest.raises(SystemExit):
        timm.create_model('sd_resnet20_cifar', drop_path_mode='sample')
    assert 'give --drop-path-mode' in capsys.readouterr().err


def test_rates_would_lag_in_a_loop_that_tells_the_epoch_that_has_ended(prefix, capsys):
    prefix(when='early', cutoff=3)
    model = small(drop_path_rate=0.3)
    scheduler, _ = timm.scheduler.create_scheduler_v2(sgd(model), 'cosine', 9)
    timm_sd.depth_gates(model).draw()
    with pytest.raises(SystemExit):
        scheduler.step(0)
    assert 'would lag behind' in capsys.readouterr().err


TWO_SEEDS = """
import datetime, sys, torch, timm, timm.utils
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2,
                                     timeout=datetime.timedelta(seconds=20))
timm.utils.random_seed(42 + rank * int(sys.argv[3]), rank)
model = timm.create_model('test_resnet', num_classes=3, drop_path_rate=0.3)
torch.distributed.barrier()
print('trained')
"""


@pytest.mark.slow
@pytest.mark.parametrize('other', [0, 1])
def test_processes_of_different_seeds_are_refused(tmp_path, other):
    script = tmp_path / 'script.py'
    script.write_text(TWO_SEEDS)
    processes = [subprocess.Popen(
        [sys.executable, '-m', 'timm_sd', '--drop-path-mode', 'batch', str(script), str(rank), str(tmp_path / 'store'),
         str(other)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in (0, 1)]
    outputs = [process.communicate(timeout=120) for process in processes]
    if other:
        refused = [error for process, (_, error) in zip(processes, outputs, strict=True) if process.returncode == 2]
        assert refused
        assert all('in one process and' in error for error in refused)
    else:
        assert [output for output, _ in outputs] == ['trained\n'] * 2, outputs


def test_a_network_that_can_not_be_counted_trains_all_the_same(prefix, capsys, monkeypatch):
    prefix()
    monkeypatch.setattr(timm_sd.prefix, 'computed_share', lambda *_: 1 / 0)
    assert small(drop_path_rate=0.3).training
    assert capsys.readouterr().err.endswith('linear to a rate of 0.3, seed 0\n')

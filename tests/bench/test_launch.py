"""What the environment of a launcher, Slurm or MPI makes of a training."""
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from harness import launch, launcher
from harness.errors import RankError, UserError
from support.commands import SMALL, bench, command, read_results, refused, run_here
from support.processes import free_port

FOUND = dict(RANK='0', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500')


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in (*launcher.RENDEZVOUS, *launcher.MPI, *launcher.SLURM, *launcher.NOT_FOLLOWED, 'LOCAL_WORLD_SIZE',
                 'ACCELERATE_USE_CPU', 'ACCELERATE_MIXED_PRECISION', 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS'):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process


def said_by(script, env, monkeypatch, tmp_path, *args):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    said = refused(script, *args, *(['--output', tmp_path] if script == 'train.py' else []))
    assert not list(tmp_path.iterdir())
    return said


# --- what a launcher asks for

@pytest.mark.parametrize(('name', 'value'), [
    *((name, 'true') for name in launcher.NOT_FOLLOWED if name != 'ACCELERATE_DYNAMO_BACKEND'),
    ('ACCELERATE_USE_FSDP', 'True'), ('ACCELERATE_DYNAMO_BACKEND', 'INDUCTOR'), ('ACCELERATE_MIXED_PRECISION', 'fp8'),
])
@pytest.mark.parametrize('script', [['train.py'], ['validate.py', '--model', 'sd_resnet20_cifar']])
def test_what_is_not_followed_is_refused(monkeypatch, tmp_path, script, name, value):
    said = said_by(script[0], {name: value}, monkeypatch, tmp_path, *script[1:])
    assert name in said
    assert value in said
    assert "leave it out of the launcher's line" in said


def test_accumulation_is_that_of_the_flag(monkeypatch, tmp_path):
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '4')
    assert '--grad-accum-steps is 2' in refused('train.py', '--grad-accum-steps', '2', '--output', tmp_path)
    launcher.check_accumulation(4)
    assert launch.make_accelerator().gradient_accumulation_steps == 1  # else the loss would be divided twice
    assert os.environ['ACCELERATE_GRADIENT_ACCUMULATION_STEPS'] == '4'


@pytest.mark.parametrize(('said', 'given', 'settled'), [
    (None, (None, None), (None, 'bfloat16')), ('no', (False, None), (False, 'bfloat16')),
    (None, (None, 'float16'), (True, 'float16')),
    ('no', (True, 'float16'), (True, 'float16')),
    ('bf16', (None, None), (True, 'bfloat16')), ('fp16', (True, None), (True, 'float16')),
    ('fp16', (None, 'float16'), (True, 'float16')),
])
def test_the_launchers_precision_is_followed(monkeypatch, said, given, settled):
    if said is not None:
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', said)
    assert launcher.settle_precision(*given) == settled


@pytest.mark.parametrize(('given', 'flag'), [((False, None), '--no-amp'), ((None, 'float16'), '--amp-dtype float16')])
def test_a_flag_that_contradicts_it_is_refused(monkeypatch, given, flag):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    with pytest.raises(UserError, match=f'bfloat16.*{flag} is given'):
        launcher.settle_precision(*given)


# --- how processes find each other

@pytest.mark.parametrize(('change', 'words'), [
    (dict(MASTER_ADDR=None), 'not MASTER_ADDR;'), (dict(MASTER_PORT=''), 'not MASTER_PORT;'),
    (dict(RANK=None), 'not RANK;'), (dict(WORLD_SIZE=None), 'not WORLD_SIZE;'),
    (dict(LOCAL_RANK=None), 'not LOCAL_RANK;'), (dict(RANK='2'), 'RANK is 2,'),
    (dict(RANK='one'), "RANK is 'one', which is no number"), (dict(RANK='-1'), "RANK is '-1', which is no number"),
    (dict(WORLD_SIZE='2x'), "WORLD_SIZE is '2x'"), (dict(LOCAL_WORLD_SIZE='?'), "LOCAL_WORLD_SIZE is '?'"),
    (dict(MASTER_PORT='http'), "MASTER_PORT is 'http'"),
])
def test_an_incomplete_rendezvous_is_refused(monkeypatch, tmp_path, change, words):
    env = {name: value for name, value in dict(FOUND, **change).items() if value is not None}
    said = said_by('train.py', env, monkeypatch, tmp_path)
    assert words in said
    assert 'torchrun' in said


@pytest.mark.slow
@pytest.mark.parametrize('rank', ['0', '1'])
def test_processes_that_do_not_come_are_one_line(tmp_path, rank):
    env = {**os.environ, **FOUND, 'RANK': rank, 'LOCAL_RANK': rank, 'MASTER_PORT': str(free_port())}
    result = bench('train.py', *SMALL, '--timeout', '2', '--output', tmp_path, env=env)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert f'did not find each other at 127.0.0.1:{env["MASTER_PORT"]}' in result.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: True)
    monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 1)
    for name, value in dict(FOUND, LOCAL_WORLD_SIZE='2').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='2 processes .* it has 1; .*ACCELERATE_USE_CPU=true'):
        launch.make_accelerator()


def test_processes_that_would_train_apart_are_refused(monkeypatch):
    """On a device for which Accelerate has no way to join them."""
    apart = SimpleNamespace(distributed_type='NO', num_processes=1, device=torch.device('mps'))
    monkeypatch.setattr(launch, 'Accelerator', lambda **kwargs: apart)
    for name, value in FOUND.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='on mps each would train alone'):
        launch.make_accelerator()


def test_the_first_process_is_waited_for_no_longer_than_asked(monkeypatch):
    for name, value in dict(FOUND, RANK='1', MASTER_PORT=str(free_port())).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match='Connection refused'):
        launch.make_accelerator(timeout=1)


# --- tasks of Slurm and MPI

TASKS = [dict(SLURM_NTASKS='2', SLURM_PROCID='0'), dict(SLURM_STEP_NUM_TASKS='2', SLURM_PROCID='0'),
         dict(OMPI_COMM_WORLD_SIZE='2', OMPI_COMM_WORLD_RANK='0'), dict(PMI_SIZE='2', PMI_RANK='0'),
         dict(PMI_SIZE='2', PMI_RANK='0', ACCELERATE_USE_CPU='true')]


@pytest.mark.parametrize('env', TASKS, ids=lambda env: '-'.join(env))
def test_tasks_that_do_not_train_together_are_told(monkeypatch, capsys, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch.make_accelerator().num_processes == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f'warning: {next(iter(env))} says that 2 tasks were started, but this is a training of 1 ')
    with pytest.raises(UserError, match='--require-processes is 2, but here train 1 process;'):
        launch.join_processes(launch.LaunchSettings(require_processes=2))
    monkeypatch.setenv([name for name in env if name.endswith(('RANK', 'PROCID'))][0], '1')
    capsys.readouterr()
    launch.make_accelerator()
    assert capsys.readouterr().err == ''  # the first has told it


def test_one_task_is_no_matter(monkeypatch, capsys):
    for env in TASKS:
        for name, value in env.items():
            monkeypatch.setenv(name, value.replace('2', '1'))
    launch.make_accelerator()
    assert capsys.readouterr().err == ''


@pytest.mark.slow
def test_tasks_of_mpi_with_a_rendezvous_train_together(tmp_path):
    port = str(free_port())
    processes = [subprocess.Popen(
        command('train.py', *SMALL, '--epochs', '1', '--require-processes', '2', '--output', tmp_path),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=dict(
            os.environ, OMPI_COMM_WORLD_SIZE='2', OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_LOCAL_SIZE='2',
            OMPI_COMM_WORLD_LOCAL_RANK=rank, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)) for rank in '01']
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert '2 processes x batch' in said[0]


def test_accelerate_launch_that_started_one_of_two_is_told(monkeypatch, capsys):
    """As by `accelerate launch --cpu --num_processes 2`."""
    for name, value in dict(ACCELERATE_USE_CPU='True', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500').items():
        monkeypatch.setenv(name, value)
    launch.make_accelerator()
    assert 'accelerate launch was asked for several processes, and has started one' in capsys.readouterr().err
    monkeypatch.delenv('ACCELERATE_USE_CPU')
    launch.make_accelerator()  # a batch job's script may set the others for all it starts
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('said', ['bf16', 'fp16'])
def test_training_and_evaluation_follow_the_launchers_precision(monkeypatch, toy_flags, toy_folder, tmp_path, said):
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', said)
    result = run_here('train.py', *[flag for flag in toy_flags if flag != '--no-amp'], '--output', tmp_path,
                      '--experiment', 'a')
    assert result.returncode == 0, result.stderr
    assert f', {said},' in result.stderr.splitlines()[0]
    hardware = read_results(tmp_path / 'a')['hardware']
    assert (hardware['amp'], hardware.get('amp_dtype')) == (True, dict(bf16=None, fp16='float16')[said])
    evaluate = ['validate.py', '--checkpoint', tmp_path / 'a' / 'model.safetensors', '--data-dir', toy_folder]
    assert run_here(*evaluate).returncode == 0
    assert '--no-amp is given' in refused(*evaluate, '--no-amp')

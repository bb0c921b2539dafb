"""bench/throughput.py counts right; what it measures is no test's business."""
import csv
import json
import re
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch

import timing.contestants
import timing.rows
import timing.verify
import timm_sd
from harness.errors import UserError
from harness.graphs import RecordedStep
from harness.recipes import parse_train_flags
from support.commands import bench, refused, run_here
from support.networks import blocks_of
from throughput import count_kernels
from timing.contestants import CONSTANT, RECORDED, Contestant, StepSettings, Timings, Variant, build, time_in_turns
from timing.end_to_end import EndToEndSettings, Training, commands, write_subset
from timing.prefix import run_training
from timing.rows import measure, saving, spread
from timing.verify import describe, is_right, verify
from timm_sd.compute import shares_of_gated

SHORT = ['--model', 'sd_resnet20_cifar', '-b', '2', '--steps', '2', '--rounds', '2']
DROPPED = Variant('batch', 0.5)


def throughput(*args, run=run_here):
    result = run('throughput.py', *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


# --- what a run leaves


def test_a_row_for_each_contestant_in_the_table_and_in_json_csv_and_picture(tmp_path):
    modes = ('constant', 'batch', 'sample', 'torchvision-batch', 'torchvision-row')
    table = throughput(*SHORT, '--modes', *modes, '--drop-path', 0.5, 0.8, '--drop-path-scale', 'eval', '--no-memory',
                       '--output', tmp_path / 'out')
    written = json.loads((tmp_path / 'out.json').read_text())
    rows = written['rows']
    dropping = [(mode, rate) for mode in modes[1:] for rate in (0.5, 0.8)]
    # mode batch alone knows the scale eval
    assert [(row['mode'], row['drop_path'], row['scale'], row['loop']) for row in rows] == [
        ('constant', 0., 'train', False),
        *((mode, rate, 'eval' if mode == 'batch' else 'train', False) for mode, rate in dropping),
        ('batch', 0.5, 'eval', True)]
    assert {(row['model'], row['schedule'], row['compiled'], row['batch_size']) for row in rows} == {
        ('sd_resnet20_cifar', 'linear', False, 2)}
    lines = table.splitlines()[1:]
    assert [line[20:64].strip() for line in lines] == [row['name'] for row in rows]
    assert len(set(row['name'] for row in rows)) == len(rows)
    assert [line[89:97].strip() for line in lines] == [f'{row["ratio"]["median"]:.3f}' for row in rows]
    flat = list(csv.DictReader((tmp_path / 'out.csv').open()))
    assert [(row['mode'], float(row['ratio_median'])) for row in flat] == [
        (row['mode'], row['ratio']['median']) for row in rows]
    assert (tmp_path / 'out.png').read_bytes().startswith(b'\x89PNG')
    assert (tmp_path / 'out.png').stat().st_size > 10_000
    assert written['args']['output'] == 'out'  # its place says nothing


def test_blocks_open_are_those_that_ran(monkeypatch):
    """A block that is open runs its first convolution, which a hook counts; the warm-up does not count."""
    ran, time_turn = {}, Contestant.time_turn

    def counted(self, turn, round_):
        runs = []
        hooks = [block.conv1.register_forward_hook(lambda *_: runs.append(1)) for block in blocks_of(self.model)]
        seconds = time_turn(self, turn, round_)
        for hook in hooks:
            hook.remove()
        if turn == self.bare:
            ran.setdefault(self, []).append(len(runs))
        return seconds
    monkeypatch.setattr(Contestant, 'time_turn', counted)
    steps, rounds = 3, 2
    rows = measure('sd_resnet20_cifar', [CONSTANT, DROPPED, Variant('batch', 0.8)],
                   StepSettings(batch_size=2, steps=steps, rounds=rounds, memory=False))
    constant, half, most, *_ = ran.values()  # in the order of the variants, those without a stage's blocks last
    assert constant == [9 * steps] * (1 + rounds)
    for row, counts in zip(rows[1:3], (half, most), strict=True):
        assert row['blocks_open'] == pytest.approx(sum(counts[1:]) / (9 * steps * rounds), abs=1e-4)
    assert half != most


def test_any_timm_model(tmp_path):
    throughput('--model', 'test_vit', '-b', 2, '--steps', 1, '--rounds', 2, '--modes', 'constant', 'batch', 'subset',
               'sample', '--drop-path-schedule', 'uniform', '--no-memory', '--output', tmp_path / 'out')
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [(row['mode'], row['loop']) for row in rows] == [
        ('constant', False), ('batch', False), ('subset', False), ('sample', False), ('batch', True)]
    assert {row['schedule'] for row in rows[1:]} == {'uniform'}
    # blocks of one size, weighed by their multiplications; the rest are a patch embedding and a head
    shares = shares_of_gated(build('test_vit', DROPPED))
    assert shares[0] == pytest.approx(shares[-1])
    assert 0.8 < sum(shares) < 1.
    assert rows[1]['limit'] == pytest.approx(1 - (1 - rows[1]['blocks_open']) * sum(shares), abs=1e-3)


def test_profile_names_the_operators():
    table = throughput('--model', 'test_resnet', '-b', '2', '--steps', '1', '--modes', 'constant', '--profile')
    assert re.search(r'aten::\w*conv\w*_backward', table)  # which one runs depends on the processor


def test_kernels_are_what_ran_on_a_gpu():
    kinds = torch.autograd.DeviceType
    assert count_kernels([SimpleNamespace(device_type=kinds.CUDA, count=3), SimpleNamespace(
        device_type=kinds.CPU, count=70), SimpleNamespace(device_type=kinds.CUDA, count=4)]) == 7


@pytest.mark.parametrize(('args', 'words'), [
    (['--modes', 'batch'], ['lacks constant']),
    (['--sweep', '--model', 'resnet18'], ['resnet18', 'sd_resnet*_cifar']),
    (['--drop-path', '0'], ['--drop-path 0']),
    (['--end-to-end', '--timm-train', 'nowhere.py'], ['nowhere.py']),
    (['--prefix'], ['--timm-train']),
    (['--prefix', '--host'], ['--host and --prefix do different things']),
    (['--cuda-graphs', '--host'], ['--cuda-graphs goes with']),
    (['--cuda-graphs', '--model', 'resnet18'], ['--cuda-graphs can not record ResNet']),
    (['--output', '/proc/nowhere/out'], ['--output', '/proc/nowhere']),  # before it has measured anything
    (['--verify', '--grad-checkpointing'], ['--cuda-graphs can not record --grad-checkpointing']),
])
def test_mistakes_are_one_line(args, words):
    said = refused('throughput.py', *args)
    assert all(word in said for word in words)


# --- what is computed of the times


def test_median_and_quartiles():
    assert spread([4., 1., 3., 2., 5., 6., 7.]) == dict(median=4., q1=2., q3=6.)


def test_the_saving_of_a_case_done_by_hand():
    """Two rounds of two steps; blocks that cost 2, 1 and 1 seconds, and 1 second that nothing saves."""
    draws = [[[True, False, False], [True, True, False]],  # 2 and 1 seconds can be saved: 1.5 a step
             [[False, True, True], [False, False, True]]]  # 2 and 3: 2.5 a step
    found = saving(draws, [2., 1., 1.], seconds=[4.25, 2.5], full=[5., 5.], constant=[5., 5.])
    assert found['blocks_open'] == pytest.approx((1 + 2 + 2 + 1) / 4 / 3, abs=1e-4)
    assert found['limit'] == pytest.approx(1 - 2. / 5.)
    # 0.75 of 1.5 in the first round, all 2.5 in the second
    assert found['share_of_saving']['median'] == pytest.approx((0.5 + 1.) / 2)
    # recorded, beside an eager step of 20 seconds: the limit is a ratio to that, the share is of what was saved here
    recorded = saving(draws, [2., 1., 1.], seconds=[4.25, 2.5], full=[5., 5.], constant=[20., 20.])
    assert recorded['limit'] == pytest.approx((5. - 2.) / 20.)
    assert recorded['share_of_saving'] == found['share_of_saving']


def test_without_the_costs_of_the_blocks_nothing_is_said_of_a_limit():
    assert saving([[[True, False]]], [], [1.], [2.], [2.]) == dict(blocks_open=0.5)


def test_rows_are_made_of_what_was_timed(monkeypatch):
    recorded = DROPPED._replace(cuda_graphs=True)
    seconds = {CONSTANT: [2., 4., 8.], DROPPED: [1., 3., 4.], RECORDED: [1., 2., 4.], recorded: [0.5, 1.5, 2.]}
    draws = {variant: [[[True, False]], [[False, True]], [[True, True]]] for variant in (DROPPED, recorded)}
    monkeypatch.setattr(timing.rows, 'time_in_turns', lambda model, variants, steps: Timings(
        seconds, {variant: [0.25, 0.5, 0.25] for variant in seconds},
        {DROPPED: [2., 4., 5.], recorded: [1., 2., 2.5]}, draws, {False: [], True: []}))
    monkeypatch.setattr(timing.rows, 'peak_memory', lambda model, variant, steps: 10. * (variant is CONSTANT))
    rows = measure('sd_resnet20_cifar', list(seconds), StepSettings(batch_size=12))
    assert [(row['mode'], row['cuda_graphs'], row['loop']) for row in rows] == [
        ('constant', False, False), ('batch', False, False), ('constant', True, False), ('batch', True, False),
        ('batch', False, True), ('batch', True, True)]
    # of the second: 0.5, 0.75 and 0.5; of the loop: 1, 1 and 0.625; of what is recorded half of that
    assert [row['ratio']['median'] for row in rows] == [1., 0.5, 0.5, 0.25, 1., 0.5]
    assert [row['step_seconds']['median'] for row in rows] == [4., 3., 2., 1.5, 4., 2.]
    assert [row['images_per_second'] for row in rows] == [3., 4., 6., 8., 3., 6.]
    assert [row.get('peak_mib') for row in rows] == [10., 0., 0., 0., None, None]
    assert [row['host_seconds']['median'] for row in rows[:4]] == [0.25] * 4
    assert [row.get('blocks_open') for row in rows] == [None, pytest.approx(4 / 6, abs=1e-4)] * 2 + [None] * 2
    assert [row['images_to_bare']['median'] for row in rows[4:]] == [0.75] * 2  # 0.5, 0.75 and 0.8


def test_blocks_are_weighed_by_networks_without_them_and_the_warm_up_does_not_count(monkeypatch):
    """The clock is one that takes 0.5 s for the rest of the network, and 4, 2 and 1 s for a block of each stage.

    Of a recorded step all that takes half as long.
    """
    turns = []

    def time_turn(self, turn, round_):
        seconds = 0.5 + sum(cost * len(getattr(self.model, stage)) for stage, cost in costs.items())
        seconds *= 0.5 if isinstance(self.step, RecordedStep) else 1.
        turns.append(round_)
        # constant, batch, three without a stage's blocks, and the loop; all that twice
        return (1000., 0.) if len(turns) <= 12 else (seconds, 0.125)

    costs = dict(layer1=4., layer2=2., layer3=1.)
    variants = [variant._replace(cuda_graphs=kind) for kind in (False, True) for variant in (CONSTANT, DROPPED)]
    monkeypatch.setattr(Contestant, 'time_turn', time_turn)
    timings = time_in_turns('sd_resnet20_cifar', variants, StepSettings(batch_size=2, steps=1, rounds=3))
    assert timings.block_seconds[False] == pytest.approx([4.] * 3 + [2.] * 3 + [1.] * 3)
    assert timings.block_seconds[True] == pytest.approx([2.] * 3 + [1.] * 3 + [0.5] * 3)
    assert timings.seconds == dict(zip(variants, [[21.5] * 3] * 2 + [[10.75] * 3] * 2, strict=True))
    assert timings.host_seconds == {variant: [0.125] * 3 for variant in variants}
    assert timings.loops == {variants[1]: [21.5] * 3, variants[3]: [10.75] * 3}
    assert turns == [0] * 24 + [1] * 12 + [2] * 12  # each round's own gates, those of the first to warm up with
    for variant in variants[1::2]:
        assert [len(of_round) for of_round in timings.draws[variant]] == [1, 1, 1]
        assert {len(draw) for of_round in timings.draws[variant] for draw in of_round} == {9}
    assert timings.draws[variants[1]] == timings.draws[variants[3]]


def test_recorded_steps_are_timed_beside_eager_ones(tmp_path):
    table = throughput(*SHORT, '--modes', 'constant', 'batch', 'sample', '--cuda-graphs', '--no-memory',
                       '--output', tmp_path / 'out')
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [(row['mode'], row['cuda_graphs'], row['loop']) for row in rows] == [
        ('constant', False, False), ('batch', False, False), ('sample', False, False), ('constant', True, False),
        ('batch', True, False), ('batch', False, True), ('batch', True, True)]
    assert [line[20:64].strip() for line in table.splitlines()[1:]] == [row['name'] for row in rows]
    assert len({row['name'] for row in rows}) == len(rows)


def test_verify_finds_that_recorded_steps_are_eager_ones(monkeypatch):
    for name, value in dict(STEPS=4, PARTIAL=3, EVALUATED=1, CHANGED=2, SETTINGS=[(False, True)]).items():
        monkeypatch.setattr(timing.verify, name, value)
    said = throughput('--verify', '--model', 'sd_resnet20_cifar', '-b', 3).splitlines()
    assert len(said) == 3 * 2  # constant depth and mode batch of both scales, again and recorded
    assert all(line.endswith('equal in all 4 steps') for line in said)


def test_verify_names_the_first_tensor_that_differs(monkeypatch):
    """A recorded step whose second update is a little too far."""
    update, updates = RecordedStep.update, []
    monkeypatch.setattr(timing.verify, 'STEPS', 4)
    monkeypatch.setattr(timing.verify, 'SETTINGS', [(False, True), (False, False)])

    def broken(step):
        updates.append(update(step))
        if len(updates) % 2 == 0:
            step.model.layer2[0].bn2.bias.data += 0.25

    monkeypatch.setattr(RecordedStep, 'update', broken)
    rows = verify('sd_resnet20_cifar', DROPPED, 3)
    assert [row['first_step'] for row in rows] == [None, 4] * 2
    assert {row['first_tensor'] for row in rows[1::2]} == {'layer2.0.bn2.bias'}
    assert min(row['largest_difference'] for row in rows[1::2]) > 0.1
    assert not is_right(rows)
    assert 'first differs in step 4, in layer2.0.bn2.bias; in the end by ' in describe(rows[1])
    said = run_here('throughput.py', '--verify', '--model', 'sd_resnet20_cifar', '-b', 3, '--modes', 'constant')
    assert said.returncode == 'the recorded step differs by more than the eager one does from itself'
    # a difference that the eager step has from itself comes from the kernels
    assert is_right([dict(largest_difference=2e-3), dict(largest_difference=3e-3)])
    assert not is_right([dict(largest_difference=2e-3), dict(largest_difference=3e-2)])


def test_the_loop_runs_the_gates_of_the_bare_steps():
    contestant = Contestant(build('sd_resnet20_cifar', DROPPED), StepSettings(batch_size=2, steps=3))
    drawn = []
    draw = contestant.gates.draw
    contestant.gates.draw = lambda: drawn.append(draw()) or drawn[-1]
    for turn in (contestant.bare, contestant.loop):
        contestant.time_turn(turn, 5)
    assert drawn[:3] == drawn[3:] == contestant.draws(5)
    assert contestant.draws(5) != contestant.draws(6)


def test_the_rate_of_a_trained_network_is_measured_in_evaluation(tmp_path, monkeypatch):
    create, made = timm.create_model, []
    monkeypatch.setattr(timm, 'create_model', lambda *args: made.append(create(*args)) or made[-1])
    result = run_here('throughput.py', '--inference', '--no-amp', '-b', '4', '--rounds', '2', '--model',
                      'sd_resnet20_cifar', 'sd_resnet32_cifar', '--output', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert [(row['model'], row['batch_size'], row['amp']) for row in rows] == [
        ('sd_resnet20_cifar', 4, False), ('sd_resnet32_cifar', 4, False)]
    assert [network.training for network in made] == [False, False]
    for row in rows:
        assert 0 < row['images_per_second']['q1'] <= row['images_per_second']['q3']
    assert not (tmp_path / 'out.png').exists()


@pytest.mark.parametrize('mode', ['sample', 'torchvision-row'])
def test_other_libraries_get_the_papers_rates(mode):
    network = build('sd_resnet20_cifar', Variant(mode, 0.5))
    blocks = [*network.layer1, *network.layer2, *network.layer3]
    rates = [block.drop_path.drop_prob if mode == 'sample' else block.drop_path.p for block in blocks]
    assert rates == pytest.approx([block / 9 * 0.5 for block in range(1, 10)])  # equation 4


def test_constant_depth_drops_nothing():
    model = build('sd_resnet20_cifar', CONSTANT)
    assert not timm_sd.depth_gates(model).active
    assert not any(getattr(module, 'drop_prob', 0.) for module in model.modules())


@pytest.mark.parametrize('change', [dict(scale='eval'), dict(schedule='uniform'), dict(mode='sample'),
                                    dict(drop_path=0.2), dict(compiled=True), dict(cuda_graphs=True),
                                    dict(loop=True)], ids=str)
def test_a_variant_is_known_by_its_fields_and_not_by_its_name(change):
    row = dict(name='by hand', mode='batch', drop_path=0.5, schedule='linear', scale='train', compiled=False,
               loop=False)
    assert DROPPED.describes(row)  # which is older than cuda_graphs
    assert not DROPPED.describes(dict(row, name=DROPPED.label, **change))


# --- whole epochs


def test_every_way_of_training_does_the_same_work(tmp_path):
    settings = EndToEndSettings(images=320, epochs=3, timm_train='train.py')
    turn = commands('sd_resnet20_cifar', 0.5, 64, False, tmp_path, tmp_path / 'output', settings)
    assert list(turn) == [Training('timm_sd'), Training('timm_sd', at_once=2), Training('timm_sd', processes=2),
                          Training('timm')]
    for training, together in turn.items():
        assert len(together) == training.at_once
        for line in together:
            start = next((place for place, word in enumerate(line) if word.endswith('train.py')))
            if training.project == 'timm':
                assert line[line.index('-b') + 1] == '64'
                continue
            flags = parse_train_flags(line[start + 1:])
            assert flags.batch_size * training.processes == 64
            assert (flags.model, flags.drop_path, flags.epochs, flags.lr) == ('sd_resnet20_cifar', 0.5, 3, 0.1)
            assert (flags.require_processes or 1) == training.processes
            assert not flags.amp
    folders = [line[line.index('--experiment') + 1] for together in turn.values() for line in together]
    assert len(set(folders)) == len(folders)


def test_the_ratios_of_whole_epochs_are_to_timms(monkeypatch):
    times = {Training('timm_sd'): [2., 2., 4.], Training('timm'): [3., 4., 5.]}
    monkeypatch.setattr(timing.rows, 'time_epochs', lambda *args: times)
    rows = timing.rows.measure_epochs('m', 0.5, 64, False, EndToEndSettings(images=320))
    assert [row['ratio']['median'] for row in rows] == [0.5, 1.]
    assert [row['images_per_second'] for row in rows] == [160., 80.]
    assert [row['step_seconds']['median'] for row in rows] == [0.4, 0.8]  # five steps an epoch


def test_generated_pictures_have_a_training_and_a_test_split(tmp_path):
    write_subset(tmp_path, EndToEndSettings(images=20))
    data = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / 'cache'))
    assert {split: len(rows) for split, rows in data.items()} == dict(train=20, test=4)
    assert data['train'][0]['img'].size == (32, 32)


# --- in processes of their own


@pytest.mark.slow
def test_peak_memory_grows_with_the_batch():
    peaks = [timing.contestants.peak_memory('sd_resnet20_cifar', CONSTANT, StepSettings(batch_size=size, steps=1))
             for size in (8, 256)]
    assert 0 <= peaks[0] < peaks[1] / 2


@pytest.mark.slow
def test_memory_is_in_the_table(tmp_path):
    table = throughput(*SHORT, '--modes', 'constant', '--output', tmp_path / 'out', run=bench)
    (row,) = json.loads((tmp_path / 'out.json').read_text())['rows']
    assert row['peak_mib'] >= 0
    assert float(table.splitlines()[1].split()[-1]) == row['peak_mib']


@pytest.mark.slow
def test_end_to_end_times_every_way_of_training():
    table = throughput('--end-to-end', '--model', 'sd_resnet20_cifar', '--images', 320, '-b', 64, '--repeats', 1)
    assert [line[20:64].strip() for line in table.splitlines()[1:]] == [
        'train.py', 'train.py, 2 runs at once', 'train.py, 2 processes']


# --- timm's train.py, with the prefix and without

LOGS = """
import argparse, sys, timm
parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--drop-path', type=float)
args, _ = parser.parse_known_args()
model = timm.create_model(args.model, drop_path_rate=args.drop_path)
seconds = {'Skippable': 0.2, 'Residual': 0.4}[('Skippable' if 'Skippable' in str(model) else 'Residual')]
for update, value in enumerate([9., 9., seconds, 2 * seconds]):
    print(f'Train: 0 [{update}/4 ( 1%)]  Loss: 1.0 (1.0)  Time: {value:.3f}s,  10.0/s  (3.000s, 3.0/s)  LR: 1')
"""


@pytest.fixture
def logs(tmp_path):
    """A script that logs as timm's, on blocks that are skipped twice as fast an update."""
    script = tmp_path / 'train.py'
    script.write_text(LOGS)
    return script


@pytest.mark.slow
def test_images_a_second_are_those_of_the_log(logs, tmp_path):
    table = throughput('--prefix', '--timm-train', logs, '--model', 'test_resnet', '--drop-path', 0.2, 0.5,
                       '--rounds', 2, '-b', 12, '--images', 10, '--output', tmp_path / 'out')
    written = json.loads((tmp_path / 'out.json').read_text())
    assert [(row['drop_path'], row['timm_images_per_second'], row['images_per_second'], row['faster']['median'])
            for row in written['rows']] == [(rate, 20., 40., 2.) for rate in (0.2, 0.5)]
    assert [row['multiplications'] for row in written['rows']] == [0.95, 0.89]
    assert written['args']['timm_train'] == 'train.py'
    assert table.splitlines()[0].split() == ['test_resnet', '0.2', '20.0', 'images/s', '40.0', '2.00', 'times', '(2.00',
                                             'to', '2.00),', '95%']


def test_a_script_that_fails_is_one_line(tmp_path):
    script = tmp_path / 'train.py'
    script.write_text('raise SystemExit("no data")')
    with pytest.raises(UserError, match='train.py failed: no data'):
        run_training([str(script)])


@pytest.mark.slow
def test_reading_is_timed_beside_timms(tmp_path):
    """A row for each source and project; a stream's ratio is that to timm's reading of the folder."""
    result = bench('throughput.py', '--reading', '--images', '64', '-b', '16', '--rounds', '2', '-j', '1',
                   '--memory-workers', '0', '2', '--output', tmp_path / 'reading')
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / 'reading.json').read_text())['rows']
    assert [(row['source'], row['project']) for row in rows] == [
        ('folder', 'timm_sd'), ('folder', 'timm'), ('parquet', 'timm_sd'), ('parquet', 'timm'), ('stream', 'timm_sd')]
    for row in rows:
        assert row['images_per_second']['median'] > 0
        assert 0 < row['mib']['0'] < row['mib']['2'] < 2000
        assert row['project'] != 'timm' or row['ratio'] == dict(median=1, q1=1, q3=1)
    assert len(result.stdout.splitlines()) == 6

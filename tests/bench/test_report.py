"""The reproduction report: which runs it takes, and that its cells are what these runs say."""
import csv
import json
import re
import shutil
import statistics

import pytest

import paper.figures
from harness.recipes import parse_train_flags
from harness.run_folder import COLUMNS
from paper import numbers
from paper.experiments import EFFECT, TABLE1, Experiment
from paper.kept import Found, fits, gradient_phases, machine, machines, time_ratio, verdict
from paper.report import DATA_NAMES, Report
from support.commands import BENCH, ROOT, refused, run_here
from support.markdown import pictures, sections, tables
from support.runs import OF_NO_BUDGET, add_run, kept_runs, made_up

# What the folder of 110 layers, p_L = 0.5, at the budget `full` is called.
NAME = 'cifar10-110-0.5-linear-full-0'


# --- the committed report


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """A copy of bench/results, whose report was removed and is written again."""
    folder = shutil.copytree(BENCH / 'results', tmp_path_factory.mktemp('report') / 'results')
    for path in (folder / 'reproduction').iterdir():
        if path.name != 'notes.md':
            path.unlink()
    result = run_here('reproduce.py', 'report', '--results', folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f'{folder / "reproduction" / "REPRODUCTION.md"}\n'
    return folder / 'reproduction'


@pytest.fixture(scope='module')
def parts(written):
    return sections((written / 'REPRODUCTION.md').read_text())


def kept(data, p_last, epochs):
    """The kept runs of 38 layers, read without the report's code."""
    dataset, _, is_plain = data.partition('_')
    return [results for name, results in kept_runs().items() if name not in OF_NO_BUDGET
            and results['dataset'] == f'uoft-cs/{dataset}' and results['epochs'] == epochs
            and results['model'].startswith('sd_resnet38_') and results['args']['drop_path'] == round(1 - p_last, 1)
            and results['args']['crop_padding'] == (0 if is_plain else 4)]


def mean(values, digits=2):
    spread = f' ± {statistics.stdev(values):.{digits}f} ({len(values)})' if len(values) > 1 else ''
    return f'{sum(values) / len(values):.{digits}f}{spread}' if values else ''


def test_the_committed_report_is_what_the_kept_runs_make(written):
    committed = BENCH / 'results' / 'reproduction'
    assert (written / 'REPRODUCTION.md').read_bytes() == (committed / 'REPRODUCTION.md').read_bytes()
    assert {path.name for path in written.iterdir()} == {path.name for path in committed.iterdir()}


def test_every_picture_of_the_report_is_drawn(written):
    shown = pictures((written / 'REPRODUCTION.md').read_text())
    assert len(shown) == len(set(shown)) > 0
    assert all((written / name).read_bytes().startswith(b'\x89PNG') for name in shown)
    assert all((written / name).stat().st_size > 10_000 for name in shown)


def test_38_layers_have_the_errors_of_the_kept_runs(parts):
    (_, *rows), = tables(parts['38 layers, which a CPU can train'])
    shown = 0
    for name, budget, *cells, seeds, _ in rows:
        if budget.startswith('paper'):
            continue
        data = {value: key for key, value in DATA_NAMES.items()}[name]
        epochs = int(budget.split(', ')[1].split()[0])
        found = [kept(data, p_last, epochs) for p_last in (1., 0.8, 0.5)]
        assert cells[4:] == [mean([run['test_best']['top1_err'] for run in runs]) for runs in found]
        assert cells[:3] == [mean([last_loss(run) for run in runs], 4) for runs in found]
        assert seeds == ', '.join(str(len(runs)) for runs in found)
        shown += sum(map(len, found))
    assert shown == sum('-38-' in name for name in kept_runs())


def test_readme_shows_the_errors_of_the_pair():
    rows = {row[0]: row[1:] for table in tables((ROOT / 'README.md').read_text()) for row in table
            if re.fullmatch(r'\d+ epochs', row[0])}
    assert list(rows) == ['24 epochs', '48 epochs']
    for epochs, (*cells, seeds) in rows.items():
        found = [kept('cifar10_unaugmented', p_last, int(epochs.split()[0])) for p_last in (1., 0.5)]
        assert cells == [mean([run['test_best']['top1_err'] for run in runs]).partition(' (')[0] for runs in found]
        assert seeds == ', '.join(str(len(runs)) for runs in found)


def test_readme_shows_the_errors_and_times_of_the_recipes_for_your_own_pictures():
    rows = {row[0].split('`')[1]: row[1:] for table in tables((ROOT / 'README.md').read_text()) for row in table
            if row[0].startswith(('`finetune`', '`scratch`'))}
    assert rows.keys() == {'finetune', 'scratch'}
    for recipe, (network, epochs, *cells) in rows.items():
        runs = [kept_runs()[f'imagenette_{recipe}_{mode}'] for mode in ('batch', 'sample')]
        assert {run['drop_path_rate'] for run in runs} == {0.3}
        for run in runs:
            assert (run['recipe'], run['epochs']) == (recipe, int(epochs))
            assert f'`{run["model"]}` at {run["args"]["img_size"]} px' in network
            assert run['images'] == dict(train=1472, val=500, test=500)
        assert cells == [f'{run["test_best"]["top1_err"]} %, {run["epoch_seconds"]}' for run in runs]


def test_runs_in_no_table_are_named(parts):
    assert parts['In no table'].strip().rstrip('.').partition(': ')[2].split(', ') == sorted(OF_NO_BUDGET)


def last_loss(results):
    """The training loss of a kept run's last epoch."""
    (folder,) = [BENCH / 'results' / 'runs' / name for name, other in kept_runs().items() if other == results]
    *_, row = csv.DictReader((folder / 'summary.csv').read_text().splitlines())
    return float(row['train_loss'])


def test_the_ways_of_dropping_have_the_times_that_were_measured(parts):
    _, (head, *rows) = tables(parts['Beyond the paper: what is dropped'])
    expected = []
    for path in (BENCH / 'results' / 'timing').glob('throughput*.json'):
        measured = json.loads(path.read_text())
        ratios = {row['mode']: '{median:.2f} ({q1:.2f} to {q3:.2f})'.format(**row['ratio']) for row in measured['rows']
                  if row['model'] == 'sd_resnet110_cifar' and not row['loop'] and not row.get('compiled')
                  and (row['drop_path'], row['schedule'], row['scale']) == (0.5, 'linear', 'train')}
        if ratios.keys() & {'sample', 'subset'}:
            expected.append([machine(measured['hardware']), *(ratios.get(mode, '') for mode in head[1:])])
    assert head[1:] == ['batch', 'sample', 'subset']
    assert sorted(rows) == sorted(expected)
    assert len(rows) == 4


# --- the table that it opens with


def found_runs(errors, amp=()):
    """Runs of these errors, all in bf16 unless `amp` says it of each."""
    return Found([dict(test_best=dict(top1_err=error), hardware=dict(amp=each))
                  for error, each in zip(errors, amp or [True] * len(errors), strict=True)], [])


@pytest.mark.parametrize(('constant', 'stochastic', 'words'), [
    # variances of 1 / 2 each: a standard error of (1 / 4 + 1 / 4) ** 0.5 times t = 4.303 of 2 degrees of freedom
    ([10., 11.], [4., 5.], 'reproduced: 6.00 lower, 95 % interval ± 3.04'),
    ([10., 11.], [8., 9.], 'not decided by these seeds: 2.00 lower, 95 % interval ± 3.04'),
    ([8., 9.], [12., 13.], 'not reproduced: 4.00 higher, 95 % interval ± 3.04'),
    # variances of 1 and 4: (1 / 3 + 4 / 3) ** 0.5 times t = 2.776 of 4 degrees of freedom
    ([9., 10., 11.], [4., 6., 8.], 'reproduced: 4.00 lower, 95 % interval ± 3.58'),
    # one seed doesn't show how far seeds differ
    ([10.], [8.], 'one seed, not judged: 2.00 lower'),
    ([10.], [11., 12.], 'one seed, not judged: 1.50 higher'),
    ([10., 11.], [8.], 'one seed, not judged: 2.50 lower'),
])
def test_a_verdict_is_of_what_is_more_than_the_chance_of_seeds(constant, stochastic, words):
    assert verdict(found_runs(constant), found_runs(stochastic)) == words


def test_a_verdict_names_precisions_that_differ():
    plain = 'reproduced: 6.00 lower, 95 % interval ± 3.04'
    bf16, fp32, both = (True, True), (False, False), (True, False)

    def said(constant, stochastic):
        return verdict(found_runs([10., 11.], constant), found_runs([4., 5.], stochastic))

    assert said(bf16, bf16) == said(both, both[::-1]) == plain
    assert said(bf16, both) == f'{plain}; seeds in bf16, bf16 against seeds in bf16, fp32'
    assert said(bf16, fp32) == f'{plain}; seeds in bf16, bf16 against seeds in fp32, fp32'


PLAIN = EFFECT['cifar10_unaugmented'][1.]


def add_pair(root, budget, errors, loss=0.01, **flags):
    """Runs of 38 layers at p_L = 1 and 0.5 without augmentation."""
    flags = dict(model='sd_resnet38_cifar.c10', crop_padding=0, hflip=0., **group(PLAIN, budget), **flags)
    for rate, error in zip((0., 0.5), errors, strict=True):
        add_run(root, f'{budget}-{rate}-{flags}', made_up(error, drop_path=rate, **flags),
                [dict(dict.fromkeys(COLUMNS, 1.), train_loss=loss, grad_magnitude=1.)])


def opening(root):
    return tables(Report(root).summary())[0]


def test_the_opening_table_has_a_row_for_each_budget(tmp_path):
    add_pair(tmp_path, 'fitted', (16., 15.))
    add_pair(tmp_path, 'twice', (14., 12.))
    add_pair(tmp_path, 'twice', (14.2, 12.4), seed=1)
    # constant depth alone, for longer
    add_run(tmp_path, 'full', made_up(1., model='sd_resnet38_cifar.c10', crop_padding=0, hflip=0., drop_path=0.,
                                      **group(PLAIN, 'full')))
    _, fitted, twice, *others, times, done = opening(tmp_path)
    assert fitted[2:] == [f'16.00 to 15.00, 38 layers, fitted, {PLAIN.epochs("fitted")} epochs',
                          'one seed, not judged: 1.00 lower']
    assert twice[1:] == [
        '13.63 to 11.66, 110 layers, Table 1',
        f'14.10 ± 0.14 (2) to 12.20 ± 0.28 (2), 38 layers, twice, {PLAIN.epochs("twice")} epochs',
        'reproduced: 1.90 lower, 95 % interval ± 0.96']
    not_run = ['', 'not run yet: a pair takes hours on a CPU']
    assert [row[1:] for row in others] == [['44.74 to 37.80, 110 layers, Table 1', *not_run],
                                           ['6.67 to 6.29, 38 layers, Fig. 8', *not_run]]
    assert times[1:] == ['0.73 for the training, Table 2', '', 'not measured']
    assert done[2] == '0'
    assert 'not yet' in done[3]


def test_with_augmentation_p_l_is_one_that_helps_38_layers_in_the_paper(tmp_path):
    for rate, error in ((0., 8.), (0.2, 7.), (0.5, 9.)):
        add_run(tmp_path, f'{rate}', made_up(error, model='sd_resnet38_cifar.c10', drop_path=rate),
                [dict(dict.fromkeys(COLUMNS, 0.), grad_magnitude=1.)])
    row = opening(tmp_path)[3]
    assert row[:3] == ['test error (%), CIFAR-10+, p_L = 0.8', '6.67 to 6.29, 38 layers, Fig. 8',
                       '8.00 to 7.00, 38 layers, full, 500 epochs']


@pytest.mark.parametrize(('loss', 'fit', 'words'), [
    (0.019, 'yes', 'one seed, not judged: 2.00 lower'),
    (0.021, 'no', 'says nothing: constant depth does not fit, training loss 0.021')])
def test_nothing_is_said_of_runs_that_do_not_fit(tmp_path, loss, fit, words):
    add_pair(tmp_path, 'fitted', (14., 12.), loss)
    assert opening(tmp_path)[1][-1] == words
    (_, _, row, *_), = tables(Report(tmp_path).effect())
    assert row[5] == fit


def test_with_augmentation_a_fit_is_another_loss():
    augmented, plain = EFFECT['cifar10'][1.], EFFECT['cifar10_unaugmented'][1.]
    runs = [Found([], [[dict(train_loss=loss)]]) for loss in (0.05, 0.15)]
    assert [fits(run, augmented) for run in runs] == [True, False]
    assert [fits(run, plain) for run in runs] == [False, False]


def test_each_seed_has_to_fit():
    rows = [[dict(train_loss=loss)] for loss in (0.001, 0.001, 0.03)]  # their mean is below 0.02
    assert not fits(Found([], rows), PLAIN)
    assert fits(Found([], rows[:2]), PLAIN)


def test_a_trial_says_nothing(tmp_path):
    for rate, error in ((0., 20.), (0.5, 5.)):
        run = Experiment(depth=38, drop_path=rate, augment=False)
        flags = vars(parse_train_flags(run.flags('smoke', 0, None)))
        add_run(tmp_path, f'{rate}', made_up(error, **flags))
    assert opening(tmp_path)[1][2:] == ['', 'not run yet: a pair takes hours on a CPU']
    (_, _, row, *_), = tables(Report(tmp_path).effect())
    assert row[1] == 'smoke, 4 epochs'
    assert row[5] == ''
    assert pictures(Report(tmp_path).curves()) == []


@pytest.mark.parametrize(('upper', 'words'), [
    (0.9, 'less time'), (1.1, 'less time; not in every measurement on an abacus, fp32')])
def test_less_time_is_less_in_most_turns(tmp_path, upper, words):
    times = [(dict(device='an abacus', amp=amp), {name: dict(median=median, q1=0.7, q3=q3), 'sample': dict(median=2.)})
             for amp, name, median, q3 in ((False, 'batch', 0.85, 0.9), (False, 'paper', 0.8, upper),
                                           (True, 'batch', 0.75, 0.9))]
    row = tables(Report(tmp_path, times).summary())[0][4]
    assert row[2:] == ['for a step: 0.75 on an abacus, bf16; 0.80 to 0.85 on an abacus, fp32', words]


def group(experiment, budget):
    """The flags of a budget."""
    args = vars(parse_train_flags(experiment.flags(budget, 0, None)))
    return {key: args[key] for key in ('epochs', 'decay_milestones', 'warmup_epochs', 'warmup_lr')}


# --- which runs are taken


@pytest.mark.parametrize('change', [
    dict(epochs=9), dict(lr=0.05), dict(dataset='generated'), dict(drop_path=0.4), dict(drop_path_mode='subset'),
    dict(drop_path_scale='train'), dict(hflip=0.)], ids=str)
def test_a_run_of_another_setting_is_not_taken_whatever_its_folder_is_called(tmp_path, change):
    add_run(tmp_path, NAME, made_up(1., **change))
    assert Report(tmp_path).find(Experiment(), 'full').results == []
    add_run(tmp_path, 'by-hand', made_up(2.))
    assert Report(tmp_path).find(Experiment(), 'full').errors == [2.]


def test_runs_are_in_the_order_of_their_seeds(tmp_path):
    for seed in (10, 9, 0):
        add_run(tmp_path, f'run-{seed}', made_up(float(seed), seed=seed))
    assert Report(tmp_path).find(Experiment(), 'full').errors == [0., 9., 10.]


def test_two_runs_of_the_same_seed_are_refused(tmp_path):
    for name in ('a', 'b'):
        add_run(tmp_path, name, made_up())
    said = refused('reproduce.py', 'report', '--results', tmp_path)
    assert f'{tmp_path / "runs" / "b"} is a second run of the same flags and seed' in said


@pytest.mark.parametrize(('file', 'content', 'words'), [
    ('results.json', b'{"model": "sd_res', 'results.json can not be read'),
    ('results.json', b'', 'results.json can not be read'),
    ('results.json', b'[]', 'is no mapping'),
    ('results.json', bytes(range(256)), 'results.json can not be read'),
    ('results.json', b'{"model": "sd_resnet20_cifar"}', 'results.json lacks args, best_epoch'),
    ('summary.csv', b'epoch\n0\n', 'summary.csv lacks train_loss'),
    ('summary.csv', None, 'summary.csv can not be read'),
])
def test_a_run_that_can_not_be_read_is_named(tmp_path, file, content, words):
    add_run(tmp_path, 'whole', made_up())
    add_run(tmp_path, 'broken', made_up(seed=1))
    path = tmp_path / 'runs' / 'broken' / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    said = refused('reproduce.py', 'report', '--results', tmp_path)
    assert str(path) in said
    assert words in said
    assert not (tmp_path / 'reproduction').exists()


def test_a_run_folder_with_files_of_two_runs_is_refused(tmp_path):
    for name, top1 in (('one', 80.), ('other', 70.)):
        add_run(tmp_path, name, made_up(seed=int(top1)), [dict(dict.fromkeys(COLUMNS, 1.), eval_top1=top1)])
    one, other = (tmp_path / 'runs' / name for name in ('one', 'other'))
    shutil.copy(other / 'summary.csv', one)
    said = refused('reproduce.py', 'report', '--results', tmp_path)
    assert f'{one} holds files of two runs' in said
    assert 'of summary.csv is 30.0, of results.json 20.0' in said


def test_figure_7_wants_runs_that_logged_their_gradients(tmp_path):
    row = dict.fromkeys(COLUMNS, 1.)
    for name, rate in (('a', 0.), ('b', 0.5)):
        add_run(tmp_path, name, made_up(drop_path=rate), [row] if rate else [dict(row, grad_magnitude=1.)])
    said = refused('reproduce.py', 'report', '--results', tmp_path)
    assert 'sd_resnet110_cifar.c10' in said
    assert '--log-gradients' in said


SETTINGS = {
    'cifar10': ('uoft-cs/cifar10', dict()),
    'cifar100': ('uoft-cs/cifar100', dict(config='cifar100', model='sd_resnet110_cifar.c100')),
    'svhn': ('ufldl-stanford/svhn', dict(config='svhn', model='sd_resnet152_cifar.svhn', crop_padding=0, hflip=0.)),
    'cifar10_unaugmented': ('uoft-cs/cifar10', dict(crop_padding=0, hflip=0.)),
}


@pytest.mark.parametrize('data', SETTINGS)
def test_several_seeds_are_a_mean_with_its_standard_deviation(tmp_path, data):
    dataset, flags = SETTINGS[data]
    for seed, (constant, stochastic) in enumerate([(5., 8.), (6., 8.5), (7.5, 8.25)]):
        add_run(tmp_path, f'a{seed}', made_up(constant, seed, dataset=dataset, drop_path=0., **flags))
        add_run(tmp_path, f'b{seed}', made_up(stochastic, seed, dataset=dataset, **flags))
    (_, row), = tables(Report(tmp_path).pairs('', {data: TABLE1[data]}, numbers.TABLE1))
    # deviations of 7/6, 1/6 and 4/3 from the mean; of 1/4, 1/4 and none
    assert row[3:5] == ['6.17 ± 1.26 (3)', '8.25 ± 0.25 (3)']
    assert row[7] == '3, 3'
    assert [float(cell) for cell in row[1:3]] == list(numbers.TABLE1[data])


def test_without_runs_the_paper_stands_alone(tmp_path):
    text = Report(tmp_path).write().read_text()
    assert pictures(text) == []
    (_, *rows), = tables(sections(text)['Table 1: test error'])
    assert [[float(cell) for cell in row[1:3]] for row in rows] == [
        [6.41, 5.25], [27.76, 24.98], [1.80, 1.75], [21.78, 21.98], [13.63, 11.66], [44.74, 37.80]]
    assert all(row[3:] == [''] * 6 for row in rows)


# --- times


def test_times_are_compared_on_one_machine_alone():
    hardware = dict(device='an abacus', processes=1, threads=2, cores=2)
    here, there = (Found([dict(epoch_seconds=2., hardware=dict(hardware, amp=amp))], []) for amp in (False, True))
    assert time_ratio(here, here) == '1.000'
    assert time_ratio(here, there) == ''
    assert machines(there, here, there) == 'an abacus, bf16; an abacus, fp32'
    both = Found(here.results + there.results, [])
    assert (here.seconds, both.seconds) == ([2.], [])  # a mean over machines is of neither


def test_the_time_of_runs_made_side_by_side_is_left_out(tmp_path):
    cifar100 = dict(config='cifar100', model='sd_resnet110_cifar.c100')
    for name, flags, cores in (('alone', {}, 2), ('beside', cifar100, 4)):
        hardware = dict(device='an abacus', threads=2, processes=1, cores=cores)
        for rate, seconds in ((0., 200.), (0.5, 150.)):
            results = made_up(drop_path=rate, hardware=hardware, epoch_seconds=seconds, **flags)
            add_run(tmp_path, f'{name}-{rate}', results)
    (_, alone, beside, *_), = tables(Report(tmp_path).table2())
    assert alone[4:9] == ['200', '150', '0.750', '500', 'full']
    assert beside[4:9] == ['', '', '', '500', 'full']


def steps_row(ratio, **fields):
    return {**dict(model='sd_resnet110_cifar', mode='subset', drop_path=0.5, schedule='linear', scale='train',
                   compiled=False, loop=False, name='subset, p_L 0.5'), **fields,
            'ratio': dict(median=ratio, q1=ratio - 0.1, q3=ratio + 0.1)}


def test_steps_of_another_network_scale_schedule_or_mode_are_not_taken(tmp_path):
    others = [dict(model='sd_resnet56_cifar'), dict(scale='eval'), dict(schedule='uniform'),
              dict(mode='torchvision-row'), dict(drop_path=0.2), dict(compiled=True), dict(loop=True)]
    foreign = [steps_row(9., **other) for other in others]
    rows = [*foreign, steps_row(0.987, name='by hand'), *foreign]
    hardware = dict(device='an abacus', amp=False)
    (tmp_path / 'timing').mkdir()
    (tmp_path / 'timing' / 'throughput_by_hand.json').write_text(json.dumps(dict(rows=rows, hardware=hardware)))
    result = run_here('reproduce.py', 'report', '--results', tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / 'reproduction' / 'REPRODUCTION.md').read_text()
    _, (head, row) = tables(sections(text)['Beyond the paper: what is dropped'])
    assert dict(zip(head, row, strict=True)) == dict(
        on=machine(hardware), batch='', sample='', subset='0.99 (0.89 to 1.09)')


# --- curves


def rows_of(gradients, rates, losses, top1):
    return [dict(epoch=float(epoch), train_loss=loss, eval_top1=right, lr=rate, grad_magnitude=gradient)
            for epoch, (gradient, rate, loss, right) in enumerate(zip(gradients, rates, losses, top1, strict=True))]


RATES = [0.1, 0.1, 0.1, 0.01, 0.01, 0.001]
CONSTANT = rows_of([9e-5, 1e-5, 2e-5, 4e-5, 6e-5, 7e-5], RATES, [3., 2., 1., 0.5, 0.4, 0.25],
                   [10, 20, 30, 40, 50, 60])
STOCHASTIC = rows_of([9e-5, 8e-5, 2e-5, 10e-5, 15e-5, 21e-5], RATES, [3., 2., 2., 1., 1., 0.75],
                     [5, 15, 25, 35, 45, 55])


def test_the_gradient_of_a_phase_is_the_median_of_its_epochs():
    assert gradient_phases(CONSTANT) == pytest.approx([2., 5., 7.])
    warmup = rows_of([100.], [0.01], [3.], [1])
    assert gradient_phases(warmup + CONSTANT) == pytest.approx([2., 5., 7.])


def test_curves_are_tables_of_the_phases_and_the_last_loss(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr('paper.figures.save_figure', lambda figure, panels, path: drawn.update({path.name: figure}))
    other = [dict(row, train_loss=9.) for row in CONSTANT]
    for name, flags, rows in (('a', dict(drop_path=0.), CONSTANT), ('b', {}, STOCHASTIC),
                              ('c', dict(drop_path=0., model='sd_resnet38_cifar.c10'), other)):
        add_run(tmp_path, name, made_up(**flags), [dict(dict.fromkeys(COLUMNS, 0.), **row) for row in rows])
    text = Report(tmp_path).curves()
    (_, paper, losses), (_, *phases) = tables(text)  # 38 layers at constant depth alone are not compared
    label = '110 layers, CIFAR-10+, full, 500 epochs'
    assert paper[1:] == ['0.0006', '0.011']
    assert losses == [label, '0.2500', '0.7500']
    assert phases[3:] == [[label, '1', '2.000', '8.000', '4.0'], [label, '2', '5.000', '12.500', '2.5'],
                          [label, '3', '7.000', '21.000', '3.0']]
    assert set(drawn) == {'curves-110-cifar10-full-0.png'} == set(pictures(text))
    (figure,) = drawn.values()
    assert figure.get_suptitle() == f'{label}, seed 0'
    losses, errors, gradients = figure.axes
    for axes, lines in ((losses, [[3., 2., 1., 0.5, 0.4, 0.25], [3., 2., 2., 1., 1., 0.75]]),
                        (errors, [[90, 80, 70, 60, 50, 40], [95, 85, 75, 65, 55, 45]])):
        assert [list(line.get_ydata()) for line in axes.lines] == lines
        assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3, 4, 5, 6]] * 2
    assert [line.get_label() for line in losses.lines] == ['constant depth', 'stochastic, p_L = 0.5']
    falls = [list(line.get_xdata()) for line in gradients.lines[2:]]
    assert falls == [[3.5, 3.5], [5.5, 5.5]]  # between the epochs 3 and 4, and 5 and 6


@pytest.mark.parametrize(('seeds', 'shown'), [(([2], [0, 2]), ', seed 2'), (([1], [0]), None)])
def test_curves_are_of_one_seed(tmp_path, monkeypatch, seeds, shown):
    drawn = []
    monkeypatch.setattr('paper.report.save_curves', lambda rows, title, path: drawn.append(rows))
    for rate, own in zip((0., 0.5), seeds, strict=True):
        for seed in own:
            rows = [dict(dict.fromkeys(COLUMNS, 1.), train_loss=float(seed), grad_magnitude=1.)]
            add_run(tmp_path, f'{rate}-{seed}', made_up(seed=seed, drop_path=rate), rows)
    text = Report(tmp_path).curves()
    if shown:
        (by_rate,) = drawn
        assert [rows[0]['train_loss'] for rows in by_rate.values()] == [2., 2.]
        assert shown in text
    else:
        assert drawn == pictures(text) == []


def test_figure_8_is_drawn_beside_the_papers(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr('paper.figures.save_figure', lambda figure, panels, path: drawn.update({path.name: figure}))
    paper.figures.save_survival({'linear': {0.5: 41., 1.: 29.}, 'uniform': {}}, numbers.FIG8_LEFT, '', tmp_path / 'l')
    theirs, ours = drawn['l'].axes
    assert list(zip(*ours.lines[0].get_data(), strict=True)) == [(0.5, 41.), (1., 29.)]
    assert (0.5, 5.25) in list(zip(*theirs.lines[0].get_data(), strict=True))
    assert (0.5, 6.14) in list(zip(*theirs.lines[1].get_data(), strict=True))
    paper.figures.save_map(numbers.FIG8_RIGHT, {**{p: {} for p in numbers.FIG8_RIGHT}, 0.8: {38: 24.61}}, '',
                           tmp_path / 'r')
    theirs, ours = drawn['r'].axes[:2]
    assert len(theirs.texts) == 36
    (text,) = ours.texts
    assert text.get_text() == '24.61'
    column, row = text.get_position()
    assert (ours.get_xticklabels()[column].get_text(), ours.get_yticklabels()[row].get_text()) == ('38', '0.8')

"""The parts of the report that the paper has not: rates over time, and depth after training."""
import json
import statistics

import pytest

from harness.run_folder import COLUMNS
from paper.beyond import depth_after_training, over_time
from paper.experiments import OVER_TIME, Experiment, training_of_experiment, training_of_run
from paper.kept import KeptRuns
from support.commands import BENCH, ROOT
from support.markdown import pictures, tables
from support.runs import add_run, kept_runs, made_up

FLAGS = {
    'constant depth': dict(drop_path=0.), 'p_L = 0.8': dict(drop_path=0.2), 'p_L = 0.5': {},
    'p_L = 0.5, early, linear': dict(drop_path_when='early', drop_path_change='linear', drop_path_cutoff=15),
    'p_L = 0.5, late': dict(drop_path_when='late', drop_path_cutoff=15),
}


def run_of(kind, seed, error=9., hardware=None):
    return made_up(config='cifar10_30', seed=seed, error=error, hardware=hardware, **FLAGS[kind])


def rows_of(seconds, epochs=30):
    return [dict(dict.fromkeys(COLUMNS, 1.), epoch=float(epoch), eval_top1=60. + epoch, train_seconds=seconds / epochs,
                 train_loss=0.5) for epoch in range(epochs)]


def test_each_kind_is_trained_by_the_recipe_and_its_schedule():
    assert FLAGS.keys() == OVER_TIME.keys()
    for kind, run in OVER_TIME.items():
        assert training_of_experiment(run, 'full') == training_of_run(run_of(kind, 0))
        assert training_of_experiment(run, 'full')['epochs'] == 30
    assert OVER_TIME['p_L = 0.5, early, linear'].name('full', 2) == \
        'cifar10_30-20-0.5-linear-train-early-linear-15-full-2'


def test_errors_are_means_and_seconds_are_compared_within_a_machine(tmp_path):
    fast, slow = dict(device='fast', threads=2), dict(device='slow', threads=1)
    for kind, seconds in zip(OVER_TIME, (100., 90., 75., 88., 87.), strict=True):
        for seed, (hardware, factor) in enumerate([(fast, 1), (fast, 1.02), (slow, 3)]):
            add_run(tmp_path, f'{kind}-{seed}', run_of(kind, seed, 9. + seed, hardware), rows_of(factor * seconds))
    (tmp_path / 'reproduction').mkdir()
    text = over_time(KeptRuns(tmp_path / 'runs'), tmp_path / 'reproduction')
    errors, seconds = tables(text)
    assert [row[0] for row in errors[1:]] == list(OVER_TIME)
    assert [row[1] for row in errors[1:]] == ['9.00', '8.00', '6.50', '8.33', '7.75']
    assert {row[4] for row in errors[1:]} == {'10.00 ± 1.00 (3)'}
    assert {row[5] for row in errors[1:]} == {'3'}
    head, on_fast, on_slow = seconds
    assert head[1:] == list(OVER_TIME)
    assert on_fast[0].startswith('fast, ')
    assert on_fast[0].endswith('2 threads')
    assert on_fast[1] == f'101 ± {statistics.stdev([100, 102]):.0f} (2) (1.00)'
    assert on_fast[3].endswith('(0.75)')
    assert on_slow[3] == '225 (0.75)'
    (picture,) = pictures(text)
    assert (tmp_path / 'reproduction' / picture).stat().st_size > 10_000


def test_an_epoch_that_other_work_slowed_down_does_not_move_the_ratio(tmp_path):
    here = dict(device='here', threads=1)
    for kind, seconds in (('constant depth', 100.), ('p_L = 0.5', 75.)):
        for seed in range(3):
            rows = rows_of(seconds)
            if kind == 'constant depth' and seed == 1:
                rows[4]['train_seconds'] *= 10
            add_run(tmp_path, f'{kind}-{seed}', run_of(kind, seed, hardware=here), rows)
    (tmp_path / 'reproduction').mkdir()
    _, (_, row) = tables(over_time(KeptRuns(tmp_path / 'runs'), tmp_path / 'reproduction'))
    assert row[1] == '110 ± 17 (3) (1.00)'
    assert row[3] == '75 ± 0 (3) (0.75)'


def test_the_main_readme_has_the_errors_and_times_of_the_report():
    report = tables((BENCH / 'results' / 'reproduction' / 'REPRODUCTION.md').read_text())
    rows = {row[0]: (row[1], row[4].removesuffix(' (3)')) for table in report for row in table if row[0] in OVER_TIME}
    ((_, (_, *seconds)),) = [table for table in report if table[0][1:] == list(OVER_TIME)]
    times = [cell.rpartition('(')[2].rstrip(')') for cell in seconds]
    (table,) = [table for table in tables((ROOT / 'README.md').read_text()) if table[1][0] == 'constant depth']
    assert table[1:] == [[kind, *rows[kind], time] for kind, time in zip(OVER_TIME, times, strict=True)]


def test_a_rate_that_rises_over_the_whole_training_is_another_training():
    rising, steady = Experiment(recipe='cifar10_30', depth=20, scale='train', change='linear'), OVER_TIME['p_L = 0.5']
    assert rising.name('full', 0) == 'cifar10_30-20-0.5-linear-train-standard-linear-full-0'
    assert training_of_experiment(rising, 'full') != training_of_experiment(steady, 'full')


def test_without_runs_there_is_no_such_part(tmp_path):
    (tmp_path / 'runs').mkdir()
    kept = KeptRuns(tmp_path / 'runs')
    assert over_time(kept, tmp_path) == depth_after_training(kept, tmp_path) == ''


@pytest.mark.parametrize(('order', 'images', 'words'), [
    ('end', None, 'the blocks at the end of each stage go first, statistics of batch norm stay'),
    ('measured', 50, 'the blocks that matter least on the validation images go first, statistics of batch norm are '
                     'estimated anew on 50 training images'),
])
def test_depths_are_named_by_the_runs_whose_weights_they_are(tmp_path, order, images, words):
    add_run(tmp_path, 'a', dict(run_of('p_L = 0.5', 0), weights_sha256='aa'), rows_of(1.))
    add_run(tmp_path, 'b', dict(run_of('constant depth', 0), weights_sha256='bb'), rows_of(1.))
    spread = dict(median=100., q1=90., q3=110.)
    rows = [dict(network=name, model='sd_resnet20_cifar.c10', blocks=blocks, share=blocks / 9, top1_err=error + blocks,
                 images_per_second=spread, removed={} if blocks == 9 else {place: {}})
            for name, error, place in (('x', 10., 'layer1.2'), ('y', 20., 'layer1.2' if order == 'end' else 'layer2.2'))
            for blocks in (9, 8, *([7] if name == 'x' else ()))]
    (tmp_path / 'depths').mkdir()
    (tmp_path / 'reproduction').mkdir()
    (tmp_path / 'depths' / 'some.json').write_text(json.dumps(dict(
        rows=rows, weights_sha256=dict(x='bb', y='aa'), split='test', order=order, bn_images=images, batch_size=128,
        hardware=dict(device='a CPU', amp=False))))
    text = depth_after_training(KeptRuns(tmp_path / 'runs'), tmp_path / 'reproduction')
    ((head, *cells),) = tables(text)
    assert head[-2:] == ['constant depth, seed 0', 'p_L = 0.5, seed 0']
    errors = [['19.00', '29.00'], ['18.00', '28.00'], ['17.00', '']]
    if order == 'end':  # the same blocks are gone in both
        assert head[:3] == ['blocks', 'multiplications', 'images/s']
        costs = [['9', '100%', '100'], ['8', '89%', '100'], ['7', '78%', '100']]
    else:
        costs = [['9'], ['8'], ['7']]
    assert cells == [cost + error for cost, error in zip(costs, errors, strict=True)]
    assert words in text
    assert pictures(text) == ['depth-some.png']


def test_kept_depths_are_of_kept_weights():
    known = {results['weights_sha256'] for results in kept_runs().values() if 'weights_sha256' in results}
    for path in (BENCH / 'results' / 'depths').glob('*.json'):
        assert set(json.loads(path.read_text())['weights_sha256'].values()) <= known


def test_the_readme_has_the_errors_of_the_kept_depths():
    depths = BENCH / 'results' / 'depths'
    errors = []
    for name in ('20_layers_end', '20_layers_end_new_statistics'):
        rows = json.loads((depths / f'{name}.json').read_text())['rows']
        for network in ('constant-0', 'standard-0.8-0', 'standard-0.5-0'):
            errors.append({row['blocks']: f'{row["top1_err"]:.2f}' for row in rows if row['network'] == network})
    (table,) = [table for table in tables((BENCH / 'README.md').read_text()) if table[0][0] == 'blocks of 9']
    assert table[1:] == [[str(blocks), *(each[blocks] for each in errors)] for blocks in (9, 8, 6, 4)]

"""The reproduction report of all trainings of the paper, made up at two budgets: every error is in its own cells."""
from collections import Counter

import pytest

from harness.recipes import parse_train_flags
from paper.experiments import TARGETS, Experiment
from support.commands import run_here
from support.markdown import pictures, sections, tables
from support.runs import add_run, made_up

EPOCHS = {'full': '500', 'fitted': '100'}  # of 38 layers on CIFAR-10+; other layers have no `fitted`
TABLE1 = {
    'CIFAR-10+': (dict(), '500'),
    'CIFAR-100+': (dict(recipe='cifar100'), '500'),
    'SVHN': (dict(recipe='svhn', depth=152), '50'),
    'ImageNet, top-1': (dict(recipe='imagenet', depth=152), '120'),
    'CIFAR-10': (dict(augment=False), '500'),
    'CIFAR-100': (dict(recipe='cifar100', augment=False), '500'),
}
EFFECT = {'CIFAR-10': (dict(augment=False), dict(full='500', fitted='24')),
          'CIFAR-100': (dict(recipe='cifar100', augment=False), dict(full='500', fitted='60')),
          'CIFAR-10+': (dict(), dict(full='500', fitted='100'))}


class Errors(dict):
    """The made-up error of each experiment and budget, and how often it was asked for."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def of(self, budget, **kwargs):
        self.asked[Experiment(**kwargs), budget] += 1
        return self[Experiment(**kwargs), budget]


@pytest.fixture(scope='module')
def errors():
    found = Errors()
    for budget in EPOCHS:
        for run in dict.fromkeys(TARGETS['all'] + TARGETS['effect']):
            if run.epochs(budget) is not None:
                found[run, budget] = f'{50 + len(found) / 100:.2f}'  # no figure of the paper
    return found


@pytest.fixture(scope='module')
def folder(errors, tmp_path_factory):
    """Of the report on a made-up run of each experiment at each budget."""
    root = tmp_path_factory.mktemp('results')
    for number, ((run, budget), error) in enumerate(errors.items()):
        add_run(root, f'run {number}', made_up(float(error), **vars(parse_train_flags(run.flags(budget, 0, None)))))
    result = run_here('reproduce.py', 'report', '--results', root)
    assert result.returncode == 0, result.stderr
    return root / 'reproduction'


@pytest.fixture(scope='module')
def text(folder):
    return (folder / 'REPRODUCTION.md').read_text()


def ending_in(p_last, schedule='linear'):
    """How p_L and the schedule say it of an experiment; at p_L = 1 the schedule decides nothing."""
    return dict(drop_path=0.) if p_last == '1' else dict(drop_path=round(1 - float(p_last), 1), schedule=schedule)


def test_every_error_is_in_its_own_cells_and_in_no_other(text, errors):
    parts = sections(text)
    (_, *rows), = tables(parts['Table 1: test error'])
    expected = [[name, errors.of('full', drop_path=0., **network), errors.of('full', **network), epochs, 'full']
                for name, (network, epochs) in TABLE1.items()]
    assert [[row[0], *row[3:7]] for row in rows] == expected

    (_, *rows), = tables(parts['1202 layers'])
    network = dict(recipe='cifar10_1202', depth=1202)
    assert [row[3:7] for row in rows] == [
        [errors.of('full', drop_path=0., **network), errors.of('full', **network), '300', 'full']]

    (_, *rows), = tables(parts['38 layers, which a CPU can train'])
    assert [[row[0], row[1], *row[6:9]] for row in rows if 'paper' not in row[1]] == [
        [name, f'{budget}, {epochs} epochs',
         *(errors.of(budget, depth=38, drop_path=rate, **network) for rate in (0., 0.2, 0.5))]
        for name, (network, all_epochs) in EFFECT.items() for budget, epochs in all_epochs.items()]

    (head, *rows), = tables(parts['Figure 8, left: p_L and the schedule, 110 layers on CIFAR-10+'])
    ours = {row[0]: row[1:] for row in rows}
    assert len(head) == 1 + 10
    for schedule in ('linear', 'uniform'):
        lowest = 0.1 if schedule == 'linear' else 0.3
        assert ours[f'full, 500 epochs, {schedule}'] == [
            errors.of('full', **ending_in(p_last, schedule)) if float(p_last) >= lowest else ''
            for p_last in head[1:]]

    right = tables(parts['Figure 8, right: depth and p_L on CIFAR-10+, linear decay'])
    for budget, (_, *rows) in zip(EPOCHS, right, strict=True):
        assert [row[0] for row in rows] == ['1', '0.9', '0.8', '0.7', '0.6', '0.5']
        for p_last, *cells in rows:
            assert [cell.partition(' / ')[2] for cell in cells] == [
                errors.of(budget, depth=depth, **ending_in(p_last)) if budget == 'full' or depth == 38 else ''
                for depth in (20, 38, 56, 74, 92, 110)]
    assert all(f"The paper's / ours ({budget}, {epochs} epochs):" in text for budget, epochs in EPOCHS.items())

    (_, *rows), = tables(parts['Beyond the paper: what is dropped'])
    assert [row[:4] for row in rows] == [
        ['nothing', '', '0.1', errors.of('full', drop_path=0.)], ['batch', 'eval', '0.1', errors.of('full')],
        *([mode, 'train', '0.01', errors.of('full', mode=mode, scale='train', lr=0.01)]
          for mode in ('batch', 'sample', 'subset'))]

    assert errors.asked.keys() == errors.keys()
    cells = Counter(cell.rpartition(' / ')[2] for part in tables(text) for row in part for cell in row)
    assert {run: cells[error] for run, error in errors.items()} == dict(errors.asked)


def test_each_figure_has_its_picture(folder, text):
    names = {'fig8_left-full.png', 'fig8_right-full.png', 'fig8_right-fitted.png'}
    names |= {f'curves-{name}-full-0.png' for name in ('110-cifar10', '38-cifar10', '38-cifar10_unaugmented',
                                                       '38-cifar100_unaugmented')}
    assert set(pictures(text)) == {path.name for path in folder.glob('*.png')} == names
    assert all((folder / name).stat().st_size > 10_000 for name in names)

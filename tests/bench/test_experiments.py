"""Which trainings the paper's tables and figures take, by which flags, and how a finished one is known again."""
from itertools import groupby

import pytest
import torch

import reproduce
from harness.cli import make_settings
from harness.optimizer import OptimizerSettings, build_optimizer
from harness.recipes import changed_from_recipe, group_flags, parse_train_flags
from paper import numbers
from paper.experiments import (
    BUDGETS,
    BY_MODE,
    BY_MODE_AT_RECIPE_LR,
    DEPTH1202,
    FIG8_LEFT,
    FIG8_RIGHT,
    TABLE1,
    TARGETS,
    Experiment,
    key_of_experiment,
    key_of_run,
)
from paper.runs import ChoiceSettings, RunSettings, choose_runs
from support.runs import kept_runs, made_up


def test_trainings_that_several_figures_need_are_one():
    assert TABLE1['cifar10'][1] == FIG8_RIGHT[110, 0.5] == FIG8_LEFT['linear', 0.5] == Experiment()
    assert TABLE1['cifar10'][0] == FIG8_RIGHT[110, 1.] == FIG8_LEFT['linear', 1.] == FIG8_LEFT['uniform', 1.]
    assert len(TARGETS['fig8_right']) == 36
    names = [run.name('full', 0) for run in TARGETS['all']]
    assert len(set(names)) == len(names)
    assert all(run.name('full', 0) not in names for run in BY_MODE_AT_RECIPE_LR.values())  # known not to train


@pytest.mark.parametrize('budget', BUDGETS)
def test_no_two_trainings_have_the_same_key(budget):
    runs = {*TARGETS['all'], *BY_MODE_AT_RECIPE_LR.values()}
    if budget == 'smoke':  # one recipe for all, so without their augmentation two are the same
        runs -= {run for run in runs if not run.augment or run.recipe == 'cifar10_1202'}
    assert len({key_of_experiment(run, budget) for run in runs}) == len(runs)


def test_figures_of_the_same_network_agree_in_the_paper():
    for p_last in (0.5, 0.6, 0.7, 0.8, 0.9, 1.):
        assert numbers.FIG8_RIGHT[p_last][110] == numbers.FIG8_LEFT['linear'][p_last]
    constant, stochastic = numbers.TABLE1['cifar10']
    assert (numbers.FIG8_LEFT['linear'][1.], numbers.FIG8_LEFT['linear'][0.5]) == (constant, stochastic)
    assert numbers.FIG8_LEFT['uniform'][1.] == constant


# --- the schedules


def test_a_budget_shrinks_the_schedule_and_changes_nothing_else():
    full, short = (dict(zip(flags, flags[1:], strict=False)) for flags in (
        Experiment().flags(budget, 0, None) for budget in ('full', 'short')))
    assert full['--epochs'] == '500'
    assert '--decay-milestones' not in full  # the recipe's
    assert (short['--epochs'], short['--decay-milestones']) == ('8', '5')
    for flag in ('-c', '--model', '--drop-path', '--drop-path-scale'):
        assert full[flag] == short[flag]
    args = parse_train_flags(Experiment().flags('full', 0, None))
    assert changed_from_recipe(vars(args)) == {}


@pytest.mark.parametrize('runs', [TABLE1['cifar10'], TABLE1['cifar100_unaugmented'], TABLE1['svhn'],
                                  TABLE1['imagenet'], DEPTH1202])
def test_constant_depth_differs_in_nothing_but_the_rate(runs):
    constant, stochastic = (vars(parse_train_flags(run.flags('full', 0, None))) for run in runs)
    assert {key for key in constant if constant[key] != stochastic[key]} == {'drop_path'}
    assert (constant['drop_path'], stochastic['drop_path']) == (0., 0.5)


def test_the_ways_of_dropping_start_at_a_learning_rate_they_bear():
    rates = [parse_train_flags(runs['sample'].flags('short', 0, None)).lr for runs in (BY_MODE, BY_MODE_AT_RECIPE_LR)]
    assert rates == [0.01, 0.1]


def rates_by_epoch(experiment, budget):
    """The learning rates of a training, each with the number of its epochs."""
    args = parse_train_flags(experiment.flags(budget, 0, None))
    _, scheduler = build_optimizer(make_settings(OptimizerSettings, args), torch.nn.Linear(1, 1), 1)
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        rates.append(round(scheduler.optimizer.param_groups[0]['lr'], 6))
    return [(rate, len(list(group))) for rate, group in groupby(rates)]


@pytest.mark.parametrize(('experiment', 'budget', 'phases'), [
    (TABLE1['cifar10'][1], 'short', [(0.1, 4), (0.01, 2), (0.001, 2)]),
    (TABLE1['cifar10'][1], 'medium', [(0.1, 8), (0.01, 4), (0.001, 4)]),
    (TABLE1['svhn'][1], 'short', [(0.1, 2), (0.01, 1), (0.001, 1)]),
    (TABLE1['svhn'][1], 'medium', [(0.1, 5), (0.01, 1), (0.001, 2)]),  # milestones 30 and 35 of 50 would be one
    (TABLE1['imagenet'][1], 'short', [(0.1, 1), (0.01, 1), (0.001, 1), (0.0001, 1)]),
    (DEPTH1202[1], 'short', [(0.01, 1), (0.1, 3), (0.01, 2), (0.001, 2)]),
    (BY_MODE['sample'], 'short', [(0.01, 4), (0.001, 2), (0.0001, 2)]),
])
def test_a_short_schedule_has_every_phase(experiment, budget, phases):
    assert rates_by_epoch(experiment, budget) == phases


@pytest.mark.parametrize('budget', BUDGETS)
def test_every_training_has_flags_that_train_py_takes(budget):
    for run in {*TARGETS['all'], *BY_MODE_AT_RECIPE_LR.values()}:
        flags = group_flags(parse_train_flags(run.flags(budget, 0, None)))
        assert flags.optimizer.decay_milestones[-1] <= flags.optimizer.epochs


def test_smoke_is_the_quickstart():
    args = parse_train_flags(Experiment(depth=20).flags('smoke', 3, None))
    assert (args.dataset, args.img_size, args.epochs, args.seed) == ('digits', 16, 4, 3)


def test_a_copy_of_the_data_lies_in_a_folder_of_its_name(tmp_path):
    for run, folder in ((DEPTH1202[0], 'cifar10'), (TABLE1['svhn'][0], 'svhn')):
        assert parse_train_flags(run.flags('full', 0, tmp_path)).data_dir == str(tmp_path / folder)


# --- known again by its fields


@pytest.mark.parametrize('change', [
    dict(epochs=9), dict(lr=0.05), dict(drop_path=0.4), dict(drop_path_schedule='uniform'),
    dict(drop_path_mode='sample'), dict(drop_path_scale='train'), dict(crop_padding=0), dict(hflip=0.),
    dict(model='sd_resnet56_cifar.c10'), dict(weight_decay=5e-4), dict(decay_milestones=[5, 8]), dict(batch_size=64),
    dict(config='cifar10_short'), dict(dataset='generated'),
], ids=str)
def test_a_run_of_another_setting_is_another_training(change):
    assert key_of_run(made_up(**change)) != key_of_experiment(Experiment(), 'short')


@pytest.mark.parametrize('change', [
    {}, dict(seed=1), dict(threads=1), dict(amp=True), dict(data_dir='cifar10'), dict(grad_checkpointing=True),
    dict(config='/elsewhere/cifar10.yaml'), dict(drop_path_mode=None), dict(drop_path_mode='batch'),
    dict(experiment='by-hand'),
], ids=str)
def test_what_the_paper_does_not_say_makes_no_other_training(change):
    assert key_of_run(made_up(**change)) == key_of_experiment(Experiment(), 'short')


def test_every_kept_run_is_known_or_belongs_to_none():
    runs = {*TARGETS['all'], *BY_MODE_AT_RECIPE_LR.values()}
    keys = {key_of_experiment(run, budget) for run in runs for budget in BUDGETS}
    others = {name for name, results in kept_runs().items() if key_of_run(results) not in keys}
    # Of other epochs or data than the paper's.
    assert others == {'cifar10_1202_part', 'imagenette', 'own_imagenette', 'svhn_generated'}


# --- which are chosen


def chosen(target, **choice):
    return choose_runs(target, ChoiceSettings(**choice), RunSettings())


def test_flags_choose_runs():
    assert {run.experiment for run in chosen('fig8_right', depth=[20, 38], drop_path=[0.])} == {
        Experiment(depth=20, drop_path=0.), Experiment(depth=38, drop_path=0.)}
    assert [(run.experiment.data, run.seed) for run in chosen('table2', recipe=['svhn'], seeds=[3, 4])] == [
        ('svhn', 3), ('svhn', 4)] * 2
    assert len(chosen('depth1202')) == 2


@pytest.mark.parametrize(('experiment', 'step', 'seconds'), [
    # of 54 blocks at p_L = 0.5, linear, (3 x 54 - 1) / 4 = 40.25 are open in expectation; section 3 of the paper
    (Experiment(), 1., (45000 * 40.25 / 54 + 5000 / 3) / 128),
    (Experiment(drop_path=0.), 2., 2 * (45000 + 5000 / 3) / 128),
    (Experiment(mode='sample', scale='train'), 1., (45000 + 5000 / 3) / 128),  # saves nothing
    (Experiment(recipe='svhn', drop_path=0., depth=152), 1., (598388 + 24 * 6000 / 3) / 128),
])
def test_the_estimate_of_an_epoch(experiment, step, seconds):
    assert reproduce.estimated_epoch_seconds(experiment, 'full', step) == pytest.approx(seconds)

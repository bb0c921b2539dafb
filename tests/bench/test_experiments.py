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
    DEPTH1202,
    EFFECT,
    FIG8_LEFT,
    FIG8_RIGHT,
    TABLE1,
    TARGETS,
    Experiment,
    training_of_experiment,
    training_of_run,
)
from paper.runs import ChoiceSettings, RunSettings, choose_runs
from support.runs import OF_NO_BUDGET, kept_runs, made_up
from timm_sd.rates import RateOverTime


def test_trainings_that_several_figures_need_are_one():
    assert TABLE1['cifar10'][1] == FIG8_RIGHT[110, 0.5] == FIG8_LEFT['linear', 0.5] == Experiment()
    assert TABLE1['cifar10'][0] == FIG8_RIGHT[110, 1.] == FIG8_LEFT['linear', 1.] == FIG8_LEFT['uniform', 1.]
    assert len(TARGETS['fig8_right']) == 36
    names = [run.name('full', 0) for run in TARGETS['all']]
    assert len(set(names)) == len(names)


def experiments(budget):
    """All that can be trained at a budget."""
    return [run for run in dict.fromkeys(run for runs in TARGETS.values() for run in runs)
            if run.epochs(budget) is not None]


@pytest.mark.parametrize('budget', BUDGETS)
def test_no_two_trainings_are_taken_for_each_other(budget):
    runs = experiments(budget)
    if budget == 'smoke':  # by one recipe, so two of one model are the same
        runs = list({(run.model, run.drop_path, run.schedule, run.mode, run.scale, run.augment, run.when): run
                     for run in runs}.values())
    trainings = [training_of_experiment(run, budget) for run in runs]
    assert all(trainings.count(training) == 1 for training in trainings)


def test_figures_of_the_same_network_agree_in_the_paper():
    for p_last in (0.5, 0.6, 0.7, 0.8, 0.9, 1.):
        assert numbers.FIG8_RIGHT[p_last][110] == numbers.FIG8_LEFT['linear'][p_last]
    constant, stochastic = numbers.TABLE1['cifar10']
    assert (numbers.FIG8_LEFT['linear'][1.], numbers.FIG8_LEFT['linear'][0.5]) == (constant, stochastic)
    assert numbers.FIG8_LEFT['uniform'][1.] == constant


# --- the schedules


def test_a_budget_shrinks_the_schedule_begins_low_and_changes_nothing_else():
    run = EFFECT['cifar10'][0.5]
    full, fitted = (vars(parse_train_flags(run.flags(budget, 0, None))) for budget in ('full', 'fitted'))
    assert changed_from_recipe(full) == dict(model=run.model)
    assert {key for key in full if full[key] != fitted[key]} == {
        'epochs', 'decay_milestones', 'warmup_epochs', 'warmup_lr'}


@pytest.mark.parametrize('runs', [TABLE1['cifar10'], TABLE1['cifar100_unaugmented'], TABLE1['svhn'],
                                  TABLE1['imagenet'], DEPTH1202])
def test_constant_depth_differs_in_nothing_but_the_rate(runs):
    constant, stochastic = (vars(parse_train_flags(run.flags('full', 0, None))) for run in runs)
    assert {key for key in constant if constant[key] != stochastic[key]} == {'drop_path'}
    assert (constant['drop_path'], stochastic['drop_path']) == (0., 0.5)


def test_the_ways_of_dropping_begin_at_a_tenth_of_the_papers_learning_rate():
    assert parse_train_flags(BY_MODE['sample'].flags('full', 0, None)).lr == 0.01


def test_twice_is_twice():
    for run in experiments('fitted'):
        assert run.epochs('twice') == 2 * run.epochs('fitted') < run.epochs('full')
    assert set(TARGETS['effect']) <= set(experiments('fitted'))
    assert {run.depth for run in experiments('fitted')} == {38}  # no other depth has epochs


def rates_by_epoch(experiment, budget):
    """The learning rates of a training, each with the number of its epochs."""
    args = parse_train_flags(experiment.flags(budget, 0, None))
    _, scheduler, _ = build_optimizer(make_settings(OptimizerSettings, args), torch.nn.Linear(1, 1), 1)
    rates = []
    for epoch in range(args.epochs):
        scheduler.step(epoch)
        rates.append(round(scheduler.optimizer.param_groups[0]['lr'], 6))
    return [(rate, len(list(group))) for rate, group in groupby(rates)]


@pytest.mark.parametrize(('experiment', 'budget', 'phases'), [
    (TABLE1['cifar10'][1], 'full', [(0.1, 249), (0.01, 125), (0.001, 126)]),  # as the original
    (TABLE1['svhn'][1], 'full', [(0.1, 29), (0.01, 5), (0.001, 16)]),
    (TABLE1['imagenet'][1], 'full', [(0.1, 30), (0.01, 30), (0.001, 30), (0.0001, 30)]),
    (DEPTH1202[1], 'full', [(0.01, 10), (0.1, 139), (0.01, 75), (0.001, 76)]),
    (EFFECT['cifar10'][0.5], 'fitted', [(0.01, 1), (0.1, 49), (0.01, 25), (0.001, 25)]),
    (EFFECT['cifar10'][0.5], 'twice', [(0.01, 1), (0.1, 99), (0.01, 50), (0.001, 50)]),
    (BY_MODE['sample'], 'full', [(0.01, 249), (0.001, 125), (0.0001, 126)]),
])
def test_the_learning_rates(experiment, budget, phases):
    assert rates_by_epoch(experiment, budget) == phases


@pytest.mark.parametrize('run', TARGETS['effect'], ids=lambda run: run.name('', 0))
@pytest.mark.parametrize('budget', ['fitted', 'twice'])
def test_no_phase_is_lost_in_few_epochs(run, budget):
    epochs = run.epochs(budget)
    warmup, *phases = rates_by_epoch(run, budget)
    assert warmup == (0.01, 1)
    assert [rate for rate, _ in phases] == [0.1, 0.01, 0.001]
    for (_, length), part in zip(phases, (0.5 * epochs - 1, 0.25 * epochs, 0.25 * epochs), strict=True):
        assert abs(length - part) <= 1


@pytest.mark.parametrize('budget', BUDGETS)
def test_every_training_has_flags_that_train_py_takes(budget):
    for run in experiments(budget):
        flags = group_flags(parse_train_flags(run.flags(budget, 0, None)))
        if flags.optimizer.sched == 'multistep':
            assert flags.optimizer.decay_milestones[-1] <= flags.optimizer.epochs or budget == 'smoke'
        RateOverTime(flags.depth.drop_path_when, flags.optimizer.epochs, flags.depth.drop_path_change,
                     flags.depth.drop_path_cutoff).check()


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
    assert training_of_run(made_up(**change)) != training_of_experiment(Experiment(), 'full')


@pytest.mark.parametrize('change', [
    {}, dict(seed=1), dict(threads=1), dict(amp=True), dict(data_dir='cifar10'), dict(grad_checkpointing=True),
    dict(config='/elsewhere/cifar10.yaml'), dict(drop_path_mode=None), dict(drop_path_mode='batch'),
    dict(experiment='by-hand'),
], ids=str)
def test_what_the_paper_does_not_say_makes_no_other_training(change):
    assert training_of_run(made_up(**change)) == training_of_experiment(Experiment(), 'full')


@pytest.mark.parametrize(('flag', 'same'), [
    ('val_fraction', True), ('fingerprint', False)])  # without its fingerprint nothing says that it was CIFAR-10
def test_a_flag_that_an_older_run_lacks_had_its_default(flag, same):
    results = made_up()
    del results['args'][flag]
    assert (training_of_run(results) == training_of_experiment(Experiment(), 'full')) == same


def test_every_kept_run_is_known_or_belongs_to_none():
    known = [training_of_experiment(run, budget) for budget in BUDGETS for run in experiments(budget)]
    assert {name for name, results in kept_runs().items() if training_of_run(results) not in known} == OF_NO_BUDGET


def test_a_recipe_that_was_changed_since_makes_no_full_run_of_other_epochs():
    results = made_up(epochs=300)
    del results['changed_from_recipe']['epochs']
    assert training_of_run(dict(results, epochs=500)) == training_of_experiment(Experiment(), 'full')
    assert training_of_run(results) != training_of_experiment(Experiment(), 'full')


# --- which are chosen


def chosen(target, **choice):
    return choose_runs(target, ChoiceSettings(**choice), RunSettings())


def test_flags_choose_runs():
    assert {run.experiment for run in chosen('fig8_right', depth=[20, 38], drop_path=[0.])} == {
        Experiment(depth=20, drop_path=0.), Experiment(depth=38, drop_path=0.)}
    assert [(run.experiment.data, run.seed) for run in chosen('table2', recipe=['svhn'], seeds=[3, 4])] == [
        ('svhn', 3), ('svhn', 4)] * 2
    assert len(chosen('depth1202')) == 2
    assert len(chosen('effect', budget='fitted')) == 9  # README's first line
    assert [(run.experiment.recipe, run.experiment.depth) for run in chosen(
        'effect', augment=False, drop_path=[0.5], recipe=['cifar10'], budget='fitted')] == [('cifar10', 38)]


@pytest.mark.parametrize(('experiment', 'step', 'seconds'), [
    # of 54 blocks at p_L = 0.5, linear, (3 x 54 - 1) / 4 = 40.25 are open in expectation; section 3 of the paper
    (Experiment(), 1., (45000 * 40.25 / 54 + 5000 / 3) / 128),
    (Experiment(drop_path=0.), 2., 2 * (45000 + 5000 / 3) / 128),
    (Experiment(mode='sample', scale='train'), 1., (45000 + 5000 / 3) / 128),  # saves nothing
    (Experiment(recipe='svhn', drop_path=0., depth=152), 1., (598388 + 24 * 6000 / 3) / 128),
])
def test_the_estimate_of_an_epoch(experiment, step, seconds):
    assert reproduce.estimated_epoch_seconds(experiment, 'full', step) == pytest.approx(seconds)

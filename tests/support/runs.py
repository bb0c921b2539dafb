"""Finished runs: the kept ones, and results.json files made for a test."""
import json
import shutil
from functools import cache
from pathlib import Path

from harness.recipes import is_packaged, parse_train_flags
from support.commands import BENCH

KEPT = BENCH / 'results' / 'runs'
# What is made up is this one, 110 layers at p_L = 0.5, for the epochs of its recipe, unless a test says others.
TEMPLATE = KEPT / 'cifar10_16_epochs_scale_eval'
# Kept for figures of README.md and bench/README.md: of other epochs or data than the experiments'.
OF_NO_BUDGET = {'cifar100_16_epochs', 'cifar10_1202_part', 'cifar10_16_epochs_scale_eval',
                'cifar10_16_epochs_scale_train', 'imagenette', 'own_imagenette', 'svhn_generated',
                'imagenette_finetune_batch', 'imagenette_finetune_sample', 'imagenette_scratch_batch',
                'imagenette_scratch_sample'}


def kept_runs():
    """The results.json of every run that is kept, by its folder's name."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(KEPT.glob('*/results.json'))}


# Flags that do not change what is trained.
NO_CHANGE = {'config', 'seed', 'amp', 'threads', 'data_dir', 'grad_checkpointing', 'experiment', 'log_gradients'}


@cache
def flags_of(recipe):
    return vars(parse_train_flags(['-c', recipe]))


def made_up(error=None, seed=0, hardware=None, epoch_seconds=None, dataset=None, **flags):
    """A results.json like that of 110 layers at p_L = 0.5, by the recipe cifar10, with other flags."""
    results = json.loads((TEMPLATE / 'results.json').read_text())
    recipe = Path(flags.get('config', 'cifar10')).stem
    said = flags_of(recipe) if is_packaged(recipe) else {}
    args = {**results['args'], **said, **flags, 'seed': seed}
    args['global_batch_size'] = flags.get('global_batch_size', args['batch_size'])
    results.update(
        args=args, recipe=recipe, model=args['model'], epochs=args['epochs'], seed=seed,
        drop_path_rate=args['drop_path'], dataset=dataset or args['dataset'],
        changed_from_recipe={key: flags[key] for key in flags.keys() - NO_CHANGE if said.get(key) != flags[key]})
    results['hardware'].update(hardware or {})
    if error is not None:
        results['test_best']['top1_err'] = error
    if epoch_seconds is not None:
        results['epoch_seconds'] = epoch_seconds
    return results


def write_summary(path, rows):
    """Makes it the summary.csv of these rows."""
    lines = [','.join(rows[0]), *(','.join(map(str, row.values())) for row in rows)]
    path.write_text('\n'.join(lines) + '\n')


def add_run(results_folder, name, results, rows=None):
    """Puts a finished run under `results_folder`/runs/."""
    place = results_folder / 'runs' / name
    place.mkdir(parents=True)
    if rows:
        write_summary(place / 'summary.csv', rows)
        results = dict(results, val_top1_err_last=100 - rows[-1]['eval_top1'])
    else:
        shutil.copy(TEMPLATE / 'summary.csv', place)
    (place / 'results.json').write_text(json.dumps(results))

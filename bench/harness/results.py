"""The end of a run: its weights are tested, and the run folder gets what others read of it."""
import os
import statistics
from pathlib import Path
from typing import Any

import torch

import timm_sd
from harness.data.sources import is_public
from harness.machine import versions
from harness.network import registered_name
from harness.pictures import Mistakes, save_mistakes
from harness.plots import save_curves
from harness.recipes import TrainFlags, changed_from_recipe
from harness.run_folder import RunFolder
from harness.training import Trainer


def public_flags(flags: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """The flags of a run for others to see: without the paths of this machine.

    Args:
        flags: Of the run.
        data: Where its data came from, as results.json says it. data/pets may be a folder or a name on the Hub.
    """
    public = dict(flags, data_dir=None, output=None, resume=None, config=Path(flags['config']).stem)
    if flags['dataset'] and ('folder' in data and not flags['data_dir'] or not is_public(flags['dataset'])):
        public['dataset'] = Path(os.path.abspath(flags['dataset'])).name
    if flags.get('initial_checkpoint'):  # initial_sha256 says which one
        public['initial_checkpoint'] = Path(flags['initial_checkpoint']).name
    if flags['model'].startswith('local-dir:'):
        public['model'] = f'local-dir:{Path(os.path.abspath(flags["model"].partition(":")[2])).name}'
    return public


def without_paths(results: dict[str, Any]) -> dict[str, Any]:
    """results.json for others to see."""
    public, changed = public_flags(results['args'], results.get('data', {})), dict(results['changed_from_recipe'])
    changed.update({key: public[key] for key in ('dataset', 'initial_checkpoint') if key in changed})
    return dict(results, args=public, changed_from_recipe=changed)


def last_drop_rate(trainer: Trainer, flags: TrainFlags) -> float:
    """1 - p_L of the network."""
    return getattr(trainer.model, 'drop_path_rate', flags.depth.drop_path or 0.)


def origin(trainer: Trainer, flags: TrainFlags) -> dict[str, Any]:
    """Where the weights come from: network, recipe, data."""
    name, record = flags.network.model, trainer.data.record
    public = public_flags(flags.record, record['data'])  # the weights tell it too, and they go everywhere
    return dict(
        model=registered_name(name) if name.startswith('local-dir:') else name, recipe=public['config'],
        changed_from_recipe={key: public[key] for key in changed_from_recipe(flags.record)},
        seed=flags.training.seed, epochs=trainer.epochs,
        images={name: batches.images for name, batches in trainer.batches.items()}, **record)


def method(gates: timm_sd.DepthGates | None) -> dict[str, Any]:
    """What results.json says of the gates of a run; the method is named where a rate was above 0."""
    if gates is None or not gates.active:
        return dict(expected_depth=None, blocks=None)
    drawn = gates.mode != 'sample'
    return dict(expected_depth=gates.mean_depth if drawn else None, blocks=len(gates.open) if drawn else None,
                drop_path_mode=gates.mode, drop_path_schedule=gates.schedule, drop_path_scale=gates.scale)


def ranked(trainer: Trainer) -> list[str]:
    """The network and its average, see `Trainer.networks`; first the better one on the validation images.

    Where these are the test images nothing may be selected by them, and the average is the first.
    """
    def rank(suffix: str) -> tuple[float, bool]:
        return (-trainer.best(suffix)[1], bool(suffix)) if trainer.data.selects else (0., not suffix)
    return sorted(trainer.networks, key=rank)


def test_best_of(trainer: Trainer, suffix: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The best weights of one of `Trainer.networks`, and what results.json says of them where others are published."""
    weights, (epoch, top1) = trainer.load_best(suffix), trainer.best(suffix)
    return weights, dict(best_epoch=epoch, val_top1_err=round(100 - top1, 4), test_best=trainer.test(weights))


def finish(trainer: Trainer, flags: TrainFlags) -> dict[str, Any]:
    """Tests the best and the last epoch's weights, and writes what a run folder ends with.

    Args:
        trainer: After its last epoch.
        flags: Of the run.

    Returns:
        The contents of results.json.
    """
    progress, folder, gates = trainer.progress, trainer.folder, trainer.gates
    suffix, *others = ranked(trainer)
    best_epoch, best_top1 = trainer.best(suffix)
    last = trainer.test({name: tensor.clone() for name, tensor in trainer.networks[suffix].state_dict().items()})
    beside = {of: test_best_of(trainer, of) for of in others}  # with --model-ema the worse of the two
    weights = trainer.load_best(suffix)
    mistakes = Mistakes(len(trainer.data.class_names), trainer.batches['test'])
    best = trainer.test(weights, mistakes.add)
    confusion, worst = mistakes.gather(trainer.accelerator)
    # A resumed run may have changed machines: only epochs on the last one's machine count. The median ignores the
    # moments in which the machine had other work.
    *_, place = progress.hardware
    epoch_seconds = statistics.median(row['train_seconds'] for row, where
                                      in zip(progress.rows, progress.hardware, strict=True) if where == place)
    given = origin(trainer, flags)
    averaged = dict(averaged=suffix == '_ema') if beside else {}
    results = dict(
        given, label_names=trainer.data.class_names,
        param_count=sum(param.numel() for param in trainer.model.parameters()),
        drop_path_rate=last_drop_rate(trainer, flags),
        **method(gates),
        best_epoch=best_epoch, val_top1_err=round(100 - best_top1, 4),
        val_top1_err_last=round(100 - progress.rows[-1][f'eval_top1{suffix}'], 4), test_best=best, test_last=last,
        **averaged, **(dict(other_weights=beside[others[0]][1]) if beside else {}),
        epoch_seconds=round(epoch_seconds, 2),
        images_per_second=round(given['images']['train'] / epoch_seconds, 1),
        hardware=place, versions=versions(), args=flags.record)
    if trainer.accelerator.is_main_process:
        folder.write_summary(progress.rows)
        said = dict(given, label_names=trainer.data.class_names, model_kwargs=flags.network.model_kwargs,
                    in_memory=flags.images.in_memory, img_size=flags.images.img_size, mean=flags.images.mean,
                    std=flags.images.std, timm_sd=timm_sd.__version__)
        for of, (theirs, tested) in beside.items():
            folder.write_weights(theirs, dict(said, selected_epoch=tested['best_epoch'], averaged=of == '_ema',
                                              test_top1_err=tested['test_best']['top1_err']),
                                 f'model{of or "_without_ema"}.safetensors')
        results['weights_sha256'] = folder.write_weights(weights, dict(
            said, selected_epoch=best_epoch, test_top1_err=best['top1_err'],
            test_top1_err_last_epoch=last['top1_err'], **averaged))
        save_mistakes(confusion, worst, trainer.data.class_names, folder.path / 'mistakes.png')
        save_curves(progress.rows, results, folder.path / 'curves.png')
        folder.write_results(results)
    return results


def closing_lines(folder: RunFolder, results: dict[str, Any]) -> str:
    """Three lines for a person: where the run is, its test error, its time."""
    seconds = sum(row['train_seconds'] for row in folder.read_summary())
    best, last = results['test_best']['top1_err'], results['test_last']['top1_err']
    return (f'run folder  {folder.path}\n'
            f'test error  {best:.2f} % (weights of epoch {results["best_epoch"] + 1}), {last:.2f} % (last epoch, '
            f'{results["epochs"]})\n'
            f'time        {seconds:.0f} s of training, {results["epoch_seconds"]:.1f} s an epoch '
            f'(median), {results["images_per_second"]:.0f} images/s')

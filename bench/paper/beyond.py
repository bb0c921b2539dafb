"""Beyond the paper, in the report: rates that change over the training, and depth after it."""
import json
import statistics
from itertools import accumulate
from pathlib import Path
from typing import Any

from harness.plots import plt, save_depths, save_figure
from paper.experiments import OVER_TIME
from paper.kept import Found, KeptRuns, cell, machine, machines, seeds

STYLES: tuple[dict[str, Any], ...] = (
    dict(color='0.35', ls='--'), dict(color='tab:blue', ls=':'), dict(color='tab:orange', ls='-'),
    dict(color='tab:green', ls='-.'), dict(color='tab:red', ls=(0, (5, 1, 1, 1, 1, 1))))


def on_machines(found: dict[str, Found]) -> dict[str, dict[str, list[list[dict[str, float]]]]]:
    """The rows of the runs by machine and kind: times are compared within one machine alone."""
    places: dict[str, dict[str, list[list[dict[str, float]]]]] = {}
    for kind, runs in found.items():
        for results, rows in zip(*runs, strict=True):
            hardware = results['hardware']
            place = f'{machine(hardware)}, {hardware["threads"]} thread{"s" if hardware["threads"] > 1 else ""}'
            places.setdefault(place, {}).setdefault(kind, []).append(rows)
    return places


def seconds_of_epochs(runs: list[list[dict[str, float]]]) -> list[float]:
    """Of each epoch's steps the median over the seeds: where other work slowed one run down, the others decide."""
    return [statistics.median(row['train_seconds'] for row in epoch) for epoch in zip(*runs, strict=True)]


def over_time(kept: KeptRuns, folder: Path) -> str:
    """Rates that change over the training: errors, seconds, and a picture of both; nothing where nothing was run."""
    found = {kind: kept.find(run, 'full') for kind, run in OVER_TIME.items()}
    if not any(runs.results for runs in found.values()):
        return ''
    places = on_machines(found)
    lines = ['## Beyond the paper: when blocks drop\n',
             '20 layers on CIFAR-10+ by the recipe [cifar10_30](../../recipes/cifar10_30.yaml), linear decay, scale '
             '`train`. `early, linear`: the rate falls from 0.5 to 0 in the first 15 of 30 epochs. `late`: blocks drop '
             'in the last 15 (*Dropout Reduces Underfitting*, arXiv 2303.01500).\n',
             '| | blocks that run, of 9 | training loss | validation error | test error | seeds | on |',
             '|---|---|---|---|---|---|---|']
    for kind, runs in found.items():
        validation = [results['val_top1_err'] for results in runs.results]
        lines.append(f'| {kind} | {OVER_TIME[kind].expected_depth("full"):.2f} | {cell(runs.losses, 3)} '
                     f'| {cell(validation)} | {cell(runs.errors)} | {seeds(runs)} | {machines(runs)} |')
    lines += ['\nSeconds of the training steps of all 30 epochs; in brackets the ratio to constant depth, where each '
              'epoch counts with its median over the seeds. Times are compared within one machine.\n',
              f'| on | {" | ".join(OVER_TIME)} |', '|---' * (1 + len(OVER_TIME)) + '|']
    for place, by_kind in places.items():
        base = sum(seconds_of_epochs(by_kind.get('constant depth', [])))
        cells = []
        for kind in OVER_TIME:
            trained = by_kind.get(kind, [])
            ratio = f' ({sum(seconds_of_epochs(trained)) / base:.2f})' if trained and base else ''
            cells.append(cell([sum(row['train_seconds'] for row in rows) for rows in trained], 0) + ratio)
        lines.append(f'| {place} | {" | ".join(cells)} |')
    save_over_time(places, folder / 'over_time.png')
    return '\n'.join([*lines, '\n![validation error over seconds of training](over_time.png)'])


def save_over_time(places: dict[str, dict[str, list[list[dict[str, float]]]]], path: Path) -> None:
    """Draws validation error over seconds of training, a panel for each machine, the mean over its seeds.

    Args:
        places: See `on_machines`.
        path: The PNG to write.
    """
    figure, panels = plt.subplots(1, len(places), figsize=(1 + 7 * len(places), 4.2), layout='constrained',
                                  squeeze=False)
    for axes, (place, by_kind) in zip(panels[0], places.items(), strict=True):
        for kind, style in zip(OVER_TIME, STYLES, strict=True):
            runs = by_kind.get(kind, [])
            if runs:
                errors = zip(*([100 - row['eval_top1'] for row in rows] for rows in runs), strict=True)
                axes.plot([*accumulate(seconds_of_epochs(runs))], [*map(statistics.mean, errors)], **style,
                          label=f'{kind} ({len(runs)} seed{"s" if len(runs) > 1 else ""})')
        axes.set(xlabel='seconds of training', ylabel='validation error (%)', ylim=(5, 40))
        axes.set_title(place, fontsize=10)
        axes.legend(frameon=False)
    save_figure(figure, panels[0], path)


def _depth_table(rows: list[dict[str, Any]], networks: list[str]) -> list[str]:
    """A row for each number of blocks: the errors, and where all networks lost the same blocks, size and speed."""
    cells = {(row['network'], row['blocks']): row for row in rows}
    numbers = sorted({row['blocks'] for row in rows}, reverse=True)
    same = all(row['removed'].keys() == cells[networks[0], row['blocks']]['removed'].keys()
               for row in rows if (networks[0], row['blocks']) in cells)
    lines = [f'| blocks | {"multiplications | images/s | " if same else ""}{" | ".join(networks)} |',
             '|---|' + '---|' * (2 * same + len(networks))]
    for blocks in numbers:
        errors = [f'{cells[name, blocks]["top1_err"]:.2f}' if (name, blocks) in cells else '' for name in networks]
        first = next(cells[name, blocks] for name in networks if (name, blocks) in cells)
        cost = f'{first["share"]:.0%} | {first["images_per_second"]["median"]:.0f} | ' if same else ''
        lines.append(f'| {blocks} | {cost}{" | ".join(errors)} |')
    return lines


def depth_after_training(kept: KeptRuns, folder: Path) -> str:
    """Networks that lose blocks after training, from results/depths/*.json; nothing without them."""
    names = {results['weights_sha256']: f'{kind}, seed {results["seed"]}' for kind, run in OVER_TIME.items()
             for results in kept.find(run, 'full').results}
    parts = []
    for path in sorted((folder.parent / 'depths').glob('*.json')):
        measured = json.loads(path.read_text())
        called = {name: names.get(digest, name) for name, digest in measured['weights_sha256'].items()}
        rows = [dict(row, network=called[row['network']]) for row in measured['rows']]
        how = 'at the end of each stage' if measured['order'] == 'end' else \
            'that matter least on the validation images'
        anew = f'are estimated anew on {measured["bn_images"]} training images' if measured['bn_images'] else 'stay'
        save_depths(rows, folder / f'depth-{path.stem}.png')
        parts += [f'\n### {rows[0]["model"]}: the blocks {how} go first, statistics of batch norm {anew}\n',
                  f'{measured["split"].capitalize()} error (%); images a second by batches of {measured["batch_size"]} '
                  f'on {machine(measured["hardware"])}.\n', *_depth_table(rows, list(called.values())),
                  f'\n![error over images a second, by depth](depth-{path.stem}.png)']
    head = ('## Beyond the paper: depth after training\n\nNetworks that lost residual blocks, without further training '
            '(`timm_sd.shorten`, `validate.py --blocks`).')
    return '\n'.join([head, *parts]) if parts else ''

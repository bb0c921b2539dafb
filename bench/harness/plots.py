"""Pictures of a run, and how a picture is saved."""
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import ScalarFormatter  # noqa: E402

from harness.files import write_atomic  # noqa: E402


def save_figure(figure: Figure, panels: Iterable[Axes], path: Path) -> None:
    """Writes a figure as a PNG, with a grid in each of `panels`, and closes it."""
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def save_gates(rates: Sequence[float], path: Path, by_epoch: Sequence[float] = ()) -> None:
    """Draws the survival probability of each block, p_l, as the paper's Fig. 2, and how it changed, if it did.

    Args:
        rates: 1 - p_l of each block, in full.
        path: The PNG to write.
        by_epoch: 1 - p_L in each epoch.
    """
    changes, full, share = len(set(by_epoch)) > 1, max(rates), 1.
    figure = plt.figure(figsize=(12 if changes else 8, 2.4), layout='constrained')
    panels: Any = figure.subplots(1, 2 if changes else 1, squeeze=False, width_ratios=(2, 1) if changes else None)[0]
    axes = panels[0]
    if changes:
        share = sum(by_epoch) / len(by_epoch) / full
        panels[1].step(range(1, len(by_epoch) + 1), by_epoch, where='mid', color='black')
        panels[1].set(xlabel='epoch', ylabel='1 - p_L', ylim=(0, 1.05 * full))
    blocks = range(1, len(rates) + 1)
    axes.bar(blocks, [1 - rate for rate in rates], width=0.8, color='tab:orange', label='survives: p_l')
    axes.bar(blocks, rates, bottom=[1 - rate for rate in rates], width=0.8, color='0.85', label='dropped')
    axes.set(xlabel='block', ylabel='probability', ylim=(0, 1), xlim=(0.4, len(rates) + 0.6))
    axes.legend(loc='center left', bbox_to_anchor=(1., 0.5), frameon=False)
    mean = 'on the average of all epochs' if changes else 'in expectation'
    axes.set_title(f'{sum(1 - share * rate for rate in rates):.1f} of {len(rates)} blocks run {mean}', fontsize=10)
    save_figure(figure, panels, path)


def save_depths(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws error over images a second, a line for each network and a point for each depth.

    Args:
        rows: Of validate.py with several depths.
        path: The PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout='constrained')
    colors = ('0.4', 'tab:orange', 'tab:blue', 'tab:green', 'tab:red')
    for number, name in enumerate(dict.fromkeys(row['network'] for row in rows)):
        points = [row for row in rows if row['network'] == name]
        x, y = [row['images_per_second']['median'] for row in points], [row['top1_err'] for row in points]
        axes.plot(x, y, marker='o', ms=4, color=colors[number % len(colors)], label=name)
        for row, place in zip(points, zip(x, y, strict=True), strict=True):
            axes.annotate(str(row['blocks']), place, xytext=(0, 6), textcoords='offset points', ha='center', fontsize=8)
    axes.set(xlabel='images a second', ylabel='top-1 error (%)')
    if all(row['top1_err'] for row in rows):  # errors grow by factors
        axes.set_yscale('log')
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend(frameon=False, title='numbers: residual blocks that stay', alignment='left')
    save_figure(figure, [axes], path)


def save_curves(rows: list[dict[str, float]], results: dict[str, Any], path: Path) -> None:
    """Draws training loss and validation error by epoch, as the paper's Fig. 3, and marks the selected epoch.

    Args:
        rows: The rows of summary.csv.
        results: The contents of results.json.
        path: The PNG to write.
    """
    epochs = [row['epoch'] + 1 for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    left.semilogy(epochs, [row['train_loss'] for row in rows], color='black', label='training')
    for suffix, color, name in (('', 'tab:orange', 'validation'), ('_ema', 'tab:blue', 'validation, EMA')):
        if f'eval_loss{suffix}' in rows[0]:
            left.semilogy(epochs, [row[f'eval_loss{suffix}'] for row in rows], color=color, ls='--', label=name)
            right.plot(epochs, [100 - row[f'eval_top1{suffix}'] for row in rows], color=color, ls='--', label=name)
    left.set(xlabel='epoch', ylabel='loss')
    left.legend(frameon=False)
    best = results['best_epoch']
    right.plot(best + 1, results['test_best']['top1_err'], 'k*', ms=10, label='test, at the best validation epoch')
    right.set(xlabel='epoch', ylabel='error (%)')
    right.legend(frameon=False)
    figure.suptitle(f'{results["model"]}, drop_path_rate {results["drop_path_rate"]}, {results["dataset"]}')
    save_figure(figure, (left, right), path)

"""Pictures of runs and of what they cost."""
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
from matplotlib.ticker import NullLocator  # noqa: E402

from run_folder import write_atomic  # noqa: E402

# told apart in grey too
CONSTANT: dict[str, Any] = dict(color='0.35', ls='--', marker='s', ms=3, label='constant depth')
STOCHASTIC: dict[str, Any] = dict(color='tab:orange', ls='-', marker='o', ms=3, label='stochastic depth')


def save_gates(rates: Sequence[float], path: Path) -> None:
    """Draws the survival probability of each block, p_l, as the paper's Fig. 2.

    Args:
        rates: 1 - p_l of each block.
        path: The PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8, 2.4), layout='constrained')
    blocks = range(1, len(rates) + 1)
    axes.bar(blocks, [1 - rate for rate in rates], width=0.8, color='tab:orange', label='survives: p_l')
    axes.bar(blocks, rates, bottom=[1 - rate for rate in rates], width=0.8, color='0.85', label='dropped')
    axes.set(xlabel='block', ylabel='probability', ylim=(0, 1), xlim=(0.4, len(rates) + 0.6))
    axes.legend(loc='center left', bbox_to_anchor=(1., 0.5), frameon=False)
    axes.set_title(f'{sum(1 - rate for rate in rates):.1f} of {len(rates)} blocks run in expectation', fontsize=10)
    _save(figure, [axes], path)


def save_ratios(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the ratio of each row with its quartiles, mode batch in colour, and the limit where there is one.

    Args:
        rows: The rows of throughput.py.
        path: The PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.45 * len(rows)), layout='constrained')
    for place, row in enumerate(rows):
        ratio = row['ratio']
        low, high = ratio['median'] - ratio['q1'], ratio['q3'] - ratio['median']
        axes.barh(place, ratio['median'], height=0.6, color='tab:orange' if row['name'].startswith('batch') else '0.7',
                  xerr=[[low], [high]], error_kw=dict(lw=1, capsize=3))
        if 'limit' in row:
            axes.plot([row['limit']] * 2, [place - 0.4, place + 0.4], color='black', lw=2)
    axes.axvline(1., color='black', lw=0.8, ls=':')
    axes.set_yticks(range(len(rows)), [f'{row["model"]}, {row["name"]}' for row in rows])
    axes.invert_yaxis()
    line = '; line: the open blocks alone' if any('limit' in row for row in rows) else ''
    axes.set_xlabel(f'time a step, ratio{line}')
    _save(figure, [axes], path)


def save_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time and memory a step over depth, batch size and p_L.

    Args:
        rows: The rows of throughput.py --sweep.
        path: The PNG to write.
    """
    axes_names = dict(depth='layers', batch_size='batch', drop_path='1 - p_L')
    figure, panels = plt.subplots(2, 3, figsize=(11, 6), layout='constrained')
    for (axis, label), (top, bottom) in zip(axes_names.items(), panels.T, strict=True):
        for mode, style in (('constant', dict(color='0.4', ls='--')), ('batch', dict(color='tab:orange'))):
            points = [row for row in rows if row['axis'] == axis and row['name'].startswith(mode)]
            x = [row['at'] for row in points]
            top.plot(x, [row['step_seconds']['median'] for row in points], marker='o', ms=4, label=mode, **style)
            bottom.plot(x, [row.get('peak_mib', float('nan')) for row in points], marker='o', ms=4, **style)
        if axis != 'drop_path':
            for panel in (top, bottom):
                panel.set(xscale='log', yscale='log')
                panel.set_xticks(x, [str(value) for value in x], fontsize=8)
                panel.xaxis.set_minor_locator(NullLocator())
        bottom.set_xlabel(label)
    panels[0, 0].set_ylabel('seconds a step')
    panels[1, 0].set_ylabel('peak memory (MiB)')
    panels[0, 0].legend(frameon=False)
    _save(figure, panels.flat, path)


def _save(figure: Any, panels: Iterable[Any], path: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


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
    left.semilogy(epochs, [row['eval_loss'] for row in rows], color='tab:orange', ls='--', label='validation')
    left.set(xlabel='epoch', ylabel='loss')
    left.legend(frameon=False)
    right.plot(epochs, [100 - row['eval_top1'] for row in rows], color='tab:orange', ls='--', label='validation')
    best = results['best_epoch']
    right.plot(best + 1, results['test_best']['top1_err'], 'k*', ms=10, label='test, at the best validation epoch')
    right.set(xlabel='epoch', ylabel='error (%)')
    right.legend(frameon=False)
    figure.suptitle(f'{results["model"]}, drop_path_rate {results["drop_path_rate"]}, {results["dataset"]}')
    _save(figure, (left, right), path)


def save_losses(constant: list[dict[str, float]], stochastic: list[dict[str, float]], path: Path) -> None:
    """Draws training loss and validation error at constant and stochastic depth, as the paper's Fig. 3.

    Args:
        constant: The rows of summary.csv.
        stochastic: Likewise.
        path: The PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    for rows, style in ((constant, CONSTANT), (stochastic, STOCHASTIC)):
        epochs, some = [row['epoch'] + 1 for row in rows], max(1, len(rows) // 20)
        left.semilogy(epochs, [row['train_loss'] for row in rows], markevery=some, **style)
        right.plot(epochs, [100 - row['eval_top1'] for row in rows], markevery=some, **style)
    left.set(xlabel='epoch', ylabel='training loss')
    right.set(xlabel='epoch', ylabel='validation error (%)')
    left.legend(frameon=False)
    _save(figure, (left, right), path)


def save_gradients(constant: list[dict[str, float]], stochastic: list[dict[str, float]], path: Path) -> None:
    """Draws the mean absolute gradient of the first block's first convolution by epoch, as the paper's Fig. 7.

    Args:
        constant: The rows of summary.csv.
        stochastic: Likewise.
        path: The PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7, 3.6), layout='constrained')
    for rows, style in ((constant, CONSTANT), (stochastic, STOCHASTIC)):
        axes.semilogy([row['epoch'] + 1 for row in rows], [row['grad_magnitude'] for row in rows],
                      markevery=max(1, len(rows) // 20), **style)
    for before, row in zip(constant, constant[1:], strict=False):
        if row['lr'] < before['lr']:
            axes.axvline(row['epoch'] + 0.5, color='0.7', lw=1)
    axes.set(xlabel='epoch (lines: the learning rate falls)', ylabel='mean absolute gradient')
    axes.legend(frameon=False)
    _save(figure, [axes], path)


def save_survival(ours: dict[str, dict[float, float]], theirs: dict[str, dict[float, float]], budget: str,
                  path: Path) -> None:
    """Draws the test error over p_L, as the paper's Fig. 8 left: the paper's panel and ours.

    Args:
        ours: Test error (%) by schedule and p_L.
        theirs: Likewise.
        budget: Of our runs.
        path: The PNG to write.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    for axes, errors, title in zip(panels, (theirs, ours), ('paper, 500 epochs', f'ours, {budget}'), strict=True):
        for schedule, style in (('linear', STOCHASTIC), ('uniform', CONSTANT)):
            points = sorted(errors[schedule].items())
            line = style['ls'] if len(points) > 2 else ''  # two points make no curve
            axes.plot([p for p, _ in points], [error for _, error in points],
                      **{**style, 'label': schedule, 'ls': line})
        axes.set(xlabel='p_L', ylabel='test error (%)', title=title, xlim=(0.05, 1.05))
    panels[0].legend(frameon=False)
    _save(figure, panels, path)


def save_map(theirs: dict[float, dict[int, float]], ours: dict[float, dict[int, float]], budget: str,
             path: Path) -> None:
    """Draws the test error over depth and p_L, as the paper's Fig. 8 right: the paper's map and ours.

    Args:
        theirs: Test error (%) by p_L and depth.
        ours: Likewise; what was not run is missing, and stays white.
        budget: Of our runs.
        path: The PNG to write.
    """
    depths = list(next(iter(theirs.values())))
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
    for axes, errors, title in zip(panels, (theirs, ours), ('paper, 500 epochs', f'ours, {budget}'), strict=True):
        values = [[errors[p_last].get(depth, float('nan')) for depth in depths] for p_last in theirs]
        image = axes.imshow(values, cmap='cividis', aspect='auto')
        for row, cells in enumerate(values):
            for column, error in enumerate(cells):
                if error == error:
                    dark = image.norm(error) < 0.5
                    axes.text(column, row, f'{error:.2f}', ha='center', va='center', fontsize=9,
                              color='white' if dark else 'black')
        axes.set(xlabel='layers', ylabel='p_L', title=title)
        axes.set_xticks(range(len(depths)), depths)
        axes.set_yticks(range(len(theirs)), [f'{p_last:g}' for p_last in theirs])
        figure.colorbar(image, ax=axes, label='test error (%)')  # each panel has its own: ours may be far from theirs
    _save(figure, (), path)

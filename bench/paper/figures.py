"""The paper's figures, drawn from our runs."""
from pathlib import Path
from typing import Any

from harness.plots import plt, save_figure

# Lines that can be told apart in grey too.
CONSTANT_STYLE: dict[str, Any] = dict(color='0.35', ls='--', marker='s', ms=3, label='constant depth')
STOCHASTIC_STYLE: dict[str, Any] = dict(color='tab:orange', ls='-', marker='o', ms=3, label='stochastic depth')


def save_losses(constant: list[dict[str, float]], stochastic: list[dict[str, float]], path: Path) -> None:
    """Draws training loss and validation error at constant and stochastic depth, as the paper's Fig. 3.

    Args:
        constant: The rows of summary.csv.
        stochastic: Likewise.
        path: The PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout='constrained')
    for rows, style in ((constant, CONSTANT_STYLE), (stochastic, STOCHASTIC_STYLE)):
        epochs, some = [row['epoch'] + 1 for row in rows], max(1, len(rows) // 20)
        left.semilogy(epochs, [row['train_loss'] for row in rows], markevery=some, **style)
        right.plot(epochs, [100 - row['eval_top1'] for row in rows], markevery=some, **style)
    left.set(xlabel='epoch', ylabel='training loss')
    right.set(xlabel='epoch', ylabel='validation error (%)')
    left.legend(frameon=False)
    save_figure(figure, (left, right), path)


def save_gradients(constant: list[dict[str, float]], stochastic: list[dict[str, float]], path: Path) -> None:
    """Draws the mean absolute gradient of the first block's first convolution by epoch, as the paper's Fig. 7.

    Args:
        constant: The rows of summary.csv.
        stochastic: Likewise.
        path: The PNG to write.
    """
    figure, axes = plt.subplots(figsize=(7, 3.6), layout='constrained')
    for rows, style in ((constant, CONSTANT_STYLE), (stochastic, STOCHASTIC_STYLE)):
        axes.semilogy([row['epoch'] + 1 for row in rows], [row['grad_magnitude'] for row in rows],
                      markevery=max(1, len(rows) // 20), **style)
    for before, row in zip(constant, constant[1:], strict=False):
        if row['lr'] < before['lr']:
            axes.axvline(row['epoch'] + 0.5, color='0.7', lw=1)
    axes.set(xlabel='epoch (lines: the learning rate falls)', ylabel='mean absolute gradient')
    axes.legend(frameon=False)
    save_figure(figure, [axes], path)


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
        for schedule, style in (('linear', STOCHASTIC_STYLE), ('uniform', CONSTANT_STYLE)):
            points = sorted(errors[schedule].items())
            line = style['ls'] if len(points) > 2 else ''  # two points make no curve
            axes.plot([p for p, _ in points], [error for _, error in points],
                      **{**style, 'label': schedule, 'ls': line})
        axes.set(xlabel='p_L', ylabel='test error (%)', title=title, xlim=(0.05, 1.05))
    panels[0].legend(frameon=False)
    save_figure(figure, panels, path)


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
        figure.colorbar(image, ax=axes, label='test error (%)')  # one a panel: our errors may be far from the paper's
    save_figure(figure, (), path)

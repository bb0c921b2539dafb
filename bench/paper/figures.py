"""The paper's figures, drawn from our runs."""
from pathlib import Path
from typing import Any

from harness.plots import plt, save_figure

# Lines that can be told apart in grey too.
CONSTANT_STYLE: dict[str, Any] = dict(color='0.35', ls='--', marker='s', ms=3)
STOCHASTIC_STYLE: dict[str, Any] = dict(color='tab:orange', ls='-', marker='o', ms=3)
SOME_STYLE: dict[str, Any] = dict(color='tab:blue', ls=':', marker='^', ms=3)


def save_curves(runs: dict[float, list[dict[str, float]]], title: str, path: Path) -> None:
    """Draws training loss, validation error and gradient by epoch, as the paper's Figures 3 and 7.

    The gradient is the mean absolute one of the first block's first convolution.

    Args:
        runs: The rows of summary.csv by p_L: 1 for constant depth, and up to two others.
        title: Which runs they are.
        path: The PNG to write.
    """
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), layout='constrained')
    styles = {1.: dict(CONSTANT_STYLE, label='constant depth'), 0.5: STOCHASTIC_STYLE}
    for p_last, rows in runs.items():
        epochs = [row['epoch'] + 1 for row in rows]
        style = {'label': f'stochastic, p_L = {p_last:g}', **styles.get(p_last, SOME_STYLE),
                 'markevery': max(1, len(rows) // 20)}
        panels[0].semilogy(epochs, [row['train_loss'] for row in rows], **style)
        panels[1].plot(epochs, [100 - row['eval_top1'] for row in rows], **style)
        panels[2].semilogy(epochs, [row['grad_magnitude'] for row in rows], **style)
    constant = runs[1.]
    for before, row in zip(constant, constant[1:], strict=False):
        if row['lr'] < before['lr']:
            panels[2].axvline(row['epoch'] + 0.5, color='0.7', lw=1)
    panels[0].set(xlabel='epoch', ylabel='training loss')
    panels[1].set(xlabel='epoch', ylabel='validation error (%)')
    panels[2].set(xlabel='epoch (lines: the learning rate falls)', ylabel='mean absolute gradient')
    panels[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, panels, path)


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

"""Pictures of a run."""
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

from run_folder import write_atomic  # noqa: E402


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
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    figure.suptitle(f'{results["model"]}, drop_path_rate {results["drop_path_rate"]}, {results["dataset"]}')
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())

"""Pictures of what was timed."""
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from harness.plots import plt, save_figure


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
        is_ours = row.get('mode') == 'batch' and not row['loop']
        axes.barh(place, ratio['median'], height=0.6, color='tab:orange' if is_ours else '0.7',
                  xerr=[[low], [high]], error_kw=dict(lw=1, capsize=3))
        if 'limit' in row:
            axes.plot([row['limit']] * 2, [place - 0.4, place + 0.4], color='black', lw=2)
    axes.axvline(1., color='black', lw=0.8, ls=':')
    axes.set_yticks(range(len(rows)), [f'{row["model"]}, {row["name"]}' for row in rows])
    axes.invert_yaxis()
    line = '; line: the open blocks alone' if any('limit' in row for row in rows) else ''
    axes.set_xlabel(f'time a step, ratio{line}')
    save_figure(figure, [axes], path)


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
            points = [row for row in rows if (row['axis'], row['mode']) == (axis, mode)]
            x = [row['value'] for row in points]
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
    save_figure(figure, panels.flat, path)

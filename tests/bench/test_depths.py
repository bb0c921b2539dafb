"""validate.py --blocks and --share: each depth's error is that of the shortened network, on the card too."""
import copy
import csv
import json
import shutil

import pytest
import timm

import timm_sd
from harness import plots
from harness.card import make_card
from harness.errors import UserError
from harness.repository import read_run, write_card_folder
from publish import compare
from support.commands import read_results, refused, run_here, weights


def trained_network(folder):
    model = timm.create_model('sd_resnet20_cifar', drop_path_rate=0., num_classes=4, img_size=None)
    model.load_state_dict(weights(folder))
    return model.eval()


@pytest.fixture(scope='module')
def measured(finished, toy_flags, toy_folder, tmp_path_factory):
    """Two networks at three depths: those of a run, and those of one at constant depth."""
    output = tmp_path_factory.mktemp('depths')
    result = run_here('train.py', *toy_flags, '--drop-path', '0', '--output', output, '--experiment', 'constant')
    assert result.returncode == 0, result.stderr
    folders = dict(finished=finished[0], constant=output / 'constant')
    result = run_here('validate.py', '--checkpoint', *(folder / 'model.safetensors' for folder in folders.values()),
                      '--data-dir', toy_folder, '--blocks', '9', '7', '4', '--rounds', '2',
                      '--results-file', output / 'depth.csv')
    assert result.returncode == 0, result.stderr
    return folders, output, result


def test_each_depth_is_the_shortened_network(measured, toy_folder, tmp_path):
    folders, output, result = measured
    found = json.loads(result.stdout)
    assert found == json.loads((output / 'depth.json').read_text())
    assert [(row['network'], row['blocks']) for row in found['rows']] == [
        (name, blocks) for name in ('finished', 'constant') for blocks in (9, 7, 4)]
    for row in found['rows']:
        folder = folders[row['network']]
        model = timm_sd.shorten(trained_network(folder), blocks=row['blocks'])
        assert timm_sd.removed_blocks(model) == row['removed']
        assert found['weights_sha256'][row['network']] == read_results(folder)['weights_sha256']
        timm.models.save_for_hf(model, tmp_path / 'short', safe_serialization=True)
        alone = run_here('validate.py', '--model', f'local-dir:{tmp_path / "short"}', '--data-dir', toy_folder,
                         '--img-size', '8', '--mean', *['0.31'] * 3, '--std', *['0.38'] * 3)
        assert json.loads(alone.stdout)['top1_err'] == row['top1_err'], alone.stderr
        assert row['images_per_second']['q1'] > 0
    assert found['rows'][0]['top1_err'] == read_results(folders['finished'])['test_best']['top1_err']
    shares = [row['share'] for row in found['rows'][:3]]
    assert shares[0] == 1.
    assert shares == sorted(shares, reverse=True)


def test_table_csv_and_picture(measured):
    _, output, result = measured
    lines = result.stderr.splitlines()
    assert lines[-7].split() == ['blocks', 'multiplications', 'top-1', 'error', 'images/s']
    assert [line.split()[:2] for line in lines[-6:]] == [
        [name, blocks] for name in ('finished', 'constant') for blocks in '974']
    rows = list(csv.DictReader((output / 'depth.csv').open()))
    assert [row['blocks'] for row in rows] == ['9', '7', '4'] * 2
    assert {'network', 'top1_err', 'share', 'images_per_second_median', 'param_count'} <= rows[0].keys()
    assert (output / 'depth.png').read_bytes().startswith(b'\x89PNG')


def test_a_measured_order_and_new_statistics(finished, toy_folder):
    """By the images that training held out, and by those that it saw."""
    orders, counts = [], []

    def rank(model, batches, **kwargs):
        counts.append(sum(len(y) for _, y in batches))
        orders.append(ranked(model, batches, **kwargs))
        return orders[-1]

    def shorten(model, bn_batches=None, **kwargs):
        counts.append(sum(len(y) for _, y in bn_batches))
        return shortened(model, bn_batches=bn_batches, **kwargs)
    ranked, shortened = timm_sd.rank_blocks, timm_sd.shorten
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm_sd, 'rank_blocks', rank)
        patch.setattr(timm_sd, 'shorten', shorten)
        result = run_here('validate.py', '--checkpoint', finished[0] / 'model.safetensors', '--data-dir', toy_folder,
                          '--val-per-class', '3', '--share', '1', '0.7', '--order', 'measured', '--bn-images', '20',
                          '--rounds', '2')
    assert result.returncode == 0, result.stderr
    assert counts == [12, 20, 20]  # validation images; training images for each depth
    found = json.loads(result.stdout)
    assert (found['order'], found['bn_images']) == ('measured', 20)
    whole, short = found['rows']
    names = [f'layer{stage}.{block}' for stage in (1, 2, 3) for block in range(3)]
    assert set(short['removed']) == {names[index] for index in orders[0][:len(short['removed'])]}
    assert short['share'] <= 0.7 < whole['share'] == 1


@pytest.mark.parametrize(('flags', 'words'), [
    (('--blocks', '10'), 'blocks is 10; ResNetCifar has 9 residual blocks'),
    (('--blocks', '-1'), '-1 must lie in [0, inf)'),
    (('--share', '0.001'), 'of the multiplications lie outside'),
    (('--share', '2'), '2 must lie in [0, 1]'),
    (('--blocks', '5', '--share', '0.5'), '--blocks and --share say the same'),
    (('--order', 'measured'), '--order does nothing without --blocks or --share'),
    (('--bn-images', '5'), '--bn-images does nothing without --blocks or --share'),
    (('--blocks', '5', '--rounds', '1'), '1 must lie in [2, inf)'),
    (('--blocks', '5', '--bn-images', '37', '--val-per-class', '3'), '--bn-images is 37, and there are 36 training'),
    (('--blocks', '5', '--val-per-class', '3'), '--val-per-class does nothing without --order measured'),
    (('--blocks', '5', '--results-file', 'NOWHERE/d.csv'), '--results-file'),
    (('--blocks', '5', '--order', 'measured', '--val-per-class', '40'), 'leaves nothing of class'),
    (('--blocks', '5', '--bn-images', '9', '--val-per-class', '4'), 'was trained with [3] of each class held out, and '
                                                                    'not [4] of each class'),
    (('--blocks', '5', '--order', 'measured', '--val-split', 'test'), 'can not be judged by them'),
])
def test_what_can_not_be_is_one_line(finished, toy_folder, tmp_path, flags, words):
    flags = [flag.replace('NOWHERE', str(tmp_path / 'nowhere')) for flag in flags]
    assert words in refused('validate.py', '--checkpoint', finished[0] / 'model.safetensors', '--data-dir', toy_folder,
                            *flags)


def test_several_checkpoints_are_compared_by_depths_alone(measured, trained, toy_folder, tmp_path):
    folders = measured[0]
    files = [folder / 'model.safetensors' for folder in folders.values()]
    assert 'are compared by --blocks or --share' in refused('validate.py', '--checkpoint', *files, '--data-dir',
                                                            toy_folder)
    twin = shutil.copytree(folders['finished'], tmp_path / 'finished')
    assert "two are called 'finished'" in refused(
        'validate.py', '--checkpoint', files[0], twin / 'model.safetensors', '--data-dir', toy_folder, '--blocks', '5')
    other = trained / 'model.safetensors'
    assert 'has another label_names than' in refused('validate.py', '--checkpoint', files[0], other, '--data-dir',
                                                     toy_folder, '--blocks', '5')


def test_the_card_shows_what_was_measured(measured, run_folder, tmp_path):
    found = json.loads((measured[1] / 'depth.json').read_text())
    results = read_run(run_folder)

    def card(depth):
        if depth is not None:
            (run_folder / 'depth.json').write_text(json.dumps(depth))
        write_card_folder(run_folder, results, compare(results), tmp_path / 'card')
        return (tmp_path / 'card' / 'README.md').read_text()
    assert 'With fewer blocks' not in card(None)
    assert not (tmp_path / 'card' / 'depth.json').exists()
    depth = copy.deepcopy(found)
    depth['weights_sha256']['finished'] = results['weights_sha256']
    text = card(depth)
    for row in depth['rows'][:3]:
        assert f'| {row["blocks"]} | {100 * row["share"]:.0f} % | {row["top1_err"]:.2f} |' in text
    assert 'The blocks at the end of each stage go first, as by `timm_sd.shorten(model, blocks=N)`.' in text
    assert 'Beside them in the picture: constant.' in text
    assert '![Error over images a second with fewer blocks](depth.png)' in text
    assert (tmp_path / 'card' / 'depth.png').read_bytes().startswith(b'\x89PNG')
    assert 'that matter least on the validation images go first; `depth.json`' in card(dict(depth, order='measured'))
    for wrong in (found, dict(rows=found['rows'])):
        with pytest.raises(UserError, match='is of other weights than'):
            card(wrong)


def test_a_card_tells_how_rates_changed(run_folder, tmp_path):
    results = read_run(run_folder)
    assert 'on the average of all epochs' not in make_card(results, compare(results))
    results['args'].update(drop_path_when='late', drop_path_change='constant', drop_path_cutoff=1)
    text = make_card(results, compare(results))
    assert 'linear decay, late (from epoch 1), constant: ' in text
    assert 'blocks run in expectation, on the average of all epochs' in text


@pytest.mark.parametrize(('by_epoch', 'panels'), [([], 1), ([0.4, 0.4], 1), ([0., 0.2, 0.4], 2)])
def test_the_picture_of_the_gates_shows_rates_that_change(tmp_path, monkeypatch, by_epoch, panels):
    shown = []
    monkeypatch.setattr(plots, 'save_figure', lambda figure, axes, path: shown.append(figure))
    plots.save_gates([0.2, 0.4], tmp_path / 'gates.png', by_epoch)
    axes = shown[0].axes
    assert len(axes) == panels
    assert axes[0].get_title().startswith('1.7 of 2' if panels == 2 else '1.4 of 2')  # half of 0.6 are dropped
    if panels == 2:
        assert list(axes[1].lines[0].get_ydata()) == by_epoch

"""The bundled weights, their cards and the README say the same, and what they say is so."""
import csv
import json
import re
import subprocess
import sys

import pytest
import safetensors
import timm
from markdown_it import MarkdownIt

import publish
from harness.card import architecture, as_text, full_name, make_card
from harness.repository import read_depth
from publish import CARDS, PRETRAINED, TIMING, compare
from support.commands import ROOT, bench, run_here
from support.markdown import sections, snippets, tables
from support.runs import made_up
from timm_sd.weight_files import checksum

NAMES = sorted(path.name for path in CARDS.iterdir() if path.is_dir())
DATA = ROOT.parent / 'shared' / 'data'
each = pytest.mark.parametrize('name', NAMES)


def results_of(name):
    return json.loads((CARDS / name / 'results.json').read_text())


def card_of(name):
    return (CARDS / name / 'README.md').read_text()


def test_every_bundled_file_has_a_card():
    assert {f'sd_resnet{depth}_cifar.c10' for depth in (20, 56, 110)} <= set(NAMES)
    assert sorted(path.stem for path in PRETRAINED.glob('*.safetensors')) == NAMES


@each
def test_card_is_what_its_results_make(name):
    results = results_of(name)
    assert card_of(name) == make_card(results, compare(results), depth=read_depth(CARDS / name, results))


@each
def test_card_is_of_the_bundled_weights(name):
    results, depth = results_of(name), read_depth(CARDS / name, results_of(name))
    assert results['weights_sha256'] == checksum(str(PRETRAINED / f'{name}.safetensors'), like='0' * 64)
    if depth is not None:
        assert depth['rows'][0]['top1_err'] == results['test_best']['top1_err']


@each
def test_card_states_what_was_measured(name):
    results, parts = results_of(name), sections(card_of(name))
    (_, best, last), = tables(parts['Results'])
    assert best[1:] == [f'{results["val_top1_err"]:.2f}', f'**{results["test_best"]["top1_err"]:.2f}**']
    assert last[1:] == [f'{results["val_top1_err_last"]:.2f}', f'{results["test_last"]["top1_err"]:.2f}']
    training = {row[0]: row[1] for row in tables(parts['Training'])[0]}
    args = results['args']
    assert training['p_L'].startswith(f'{1 - args["drop_path"]:g}, linear decay: ')
    n = results['blocks']
    assert f': {n - args["drop_path"] * (n + 1) / 2:.1f} of {n} blocks' in training['p_L']  # the sum of equation 4
    assert training['learning rate'].startswith(f'{args["lr"]}, ')
    assert training['epochs, batch'] == f'{results["epochs"]}, 128'
    assert training['images'].startswith('45000 training, 5000 validation, 10000 test')
    assert "**Not the paper's recipe.** By this project's recipe, `" in parts['Training']
    if compare(results).paper is None:
        assert 'The paper reports no error of this network on these data.' in parts['Results']
    else:
        paper, = re.findall(r'^The paper reports (\S+) at p_L = .* after 500 epochs.$', parts['Results'], re.MULTILINE)
        points = results['test_best']['top1_err'] - float(paper)
        side = 'above' if points >= 0 else 'below'
        assert f'are {abs(points):.2f} points {side} the former' in parts['Results']


@each
def test_weights_name_the_run_that_made_them(name):
    results = results_of(name)
    with safetensors.safe_open(PRETRAINED / f'{name}.safetensors', 'pt') as file:
        metadata = file.metadata()
    for key in ('recipe', 'seed', 'epochs', 'dataset'):
        assert metadata[key] == str(results[key])
    assert json.loads(metadata['images']) == results['images']
    assert float(metadata['test_top1_err']) == results['test_best']['top1_err']
    rows = list(csv.DictReader((CARDS / name / 'summary.csv').read_text().splitlines()))
    assert len(rows) == results['epochs']
    best = max(rows, key=lambda row: float(row['eval_top1']))  # the first of the best, by validation alone
    assert int(best['epoch']) == results['best_epoch']


def test_readme_states_the_measured_errors_beside_those_of_others():
    rows = {row[0].strip('`'): row for table in tables((ROOT / 'README.md').read_text()) for row in table}
    assert {row for row in rows if re.fullmatch(r'sd_\w+\.\w+', row)} == set(NAMES)
    measured = json.loads((TIMING / 'inference.json').read_text())
    assert not measured['hardware']['amp']
    speeds = {row['model']: f'{row["images_per_second"]["median"]:.0f}' for row in measured['rows']}
    for name in NAMES:
        results = results_of(name)
        others = compare(results)
        assert rows[name][1:] == [
            f'{1 - results["drop_path_rate"]:g}', str(results['epochs']), f'{results["test_best"]["top1_err"]:.2f}',
            f'{others.public.error:.2f}' if others.public else '',
            f'{others.paper.stochastic:.2f}' if others.paper else '', speeds[name.partition('.')[0]]]


@each
def test_pretrained_loads_whatever_the_rate(name):
    plain = timm.create_model(name, pretrained=True, drop_path_rate=0.).state_dict()
    for kwargs in ({}, dict(drop_path_rate=0.2)):
        state = timm.create_model(name, pretrained=True, **kwargs).state_dict()
        assert all((state[key] == plain[key]).all() for key in plain)


# --- what a card holds a run against


@pytest.mark.parametrize(('scale', 'file'), [('train', 'throughput.json'), ('eval', 'throughput_eval.json')])
def test_saving_is_that_of_the_scale(scale, file):
    measured = json.loads((TIMING / file).read_text())
    (row,) = [row for row in measured['rows'] if not row['loop'] and not row['compiled'] and
              (row['mode'], row['drop_path'], row['schedule'], row['scale']) == ('batch', 0.5, 'linear', scale)]
    saving = compare(made_up(drop_path_scale=scale)).saving
    assert saving == dict(row, hardware=measured['hardware'])
    card = make_card(made_up(drop_path_scale=scale), compare(made_up(drop_path_scale=scale)))
    assert f'takes {row["ratio"]["median"]:.3f} (quartiles {row["ratio"]["q1"]:.3f} to ' in card


@pytest.mark.parametrize('change', [dict(model='sd_resnet56_cifar'), dict(mode='subset'), dict(drop_path=0.2),
                                    dict(schedule='uniform'), dict(scale='train'), dict(compiled=True),
                                    dict(loop=True)], ids=str)
def test_no_row_of_another_setting_is_taken_whatever_its_name(change, tmp_path, monkeypatch):
    row = dict(model='sd_resnet110_cifar', name='batch, p_L 0.5', mode='batch', drop_path=0.5, schedule='linear',
               scale='eval', compiled=False, loop=False, ratio=dict(median=0.8, q1=0.7, q3=0.9))
    monkeypatch.setattr(publish, 'TIMING', tmp_path)
    hardware = dict(device='an abacus', amp=False)
    for file, rows in (('throughput.json', [dict(row, **change)]), ('throughput_b.json', [dict(row, name='by hand')])):
        found = compare(made_up()).saving
        assert found is None
        (tmp_path / file).write_text(json.dumps(dict(rows=rows, hardware=hardware)))
    assert compare(made_up()).saving == dict(row, name='by hand', hardware=hardware)


def test_what_was_not_measured_is_said_so():
    results = made_up()
    results['drop_path_rate'] = 0.123
    assert compare(results).saving is None
    assert '| saving | not measured at this p_L |' in make_card(results, compare(results))


@pytest.mark.parametrize(('model', 'dataset', 'errors', 'public'), [
    ('sd_resnet110_cifar.c10', 'uoft-cs/cifar10', (5.25, 0.5, 6.41, 'Table 1', 500), 6.32),
    ('sd_resnet110_cifar.c100', 'uoft-cs/cifar100', (24.98, 0.5, 27.76, 'Table 1', 500), None),
    ('sd_resnet152_cifar.svhn', 'ufldl-stanford/svhn', (1.75, 0.5, 1.80, 'Table 1', 50), None),
    ('sd_resnet1202_cifar.c10', 'uoft-cs/cifar10', (4.91, 0.5, 6.67, 'section 4', 300), None),
    ('sd_resnet20_cifar.c10', 'uoft-cs/cifar10', (7.60, 0.9, 8.31, 'Fig. 8', 500), 7.40),
    ('sd_resnet56_cifar.c10', 'uoft-cs/cifar10', (5.66, 0.8, 6.27, 'Fig. 8', 500), 5.63),  # the best p_L
    ('sd_resnet56_cifar.c100', 'uoft-cs/cifar100', None, 27.37),
    ('sd_resnet20_cifar.c10', 'my/pictures', None, None), ('sd_resnet44_cifar.c10', 'uoft-cs/cifar10', None, 5.99),
    ('sd_resnet18', 'ILSVRC/imagenet-1k', None, None),
])
def test_the_errors_of_others_are_of_the_same_network_and_data(model, dataset, errors, public):
    augmentation = dict(crop_padding=0, hflip=0.) if 'svhn' in dataset else {}
    results = made_up(model=model, dataset=dataset, **augmentation)
    found = compare(results)
    assert (found.paper, found.public and found.public.error) == (errors, public)
    if not errors:
        assert 'The paper reports no error of this network on these data.' in make_card(results, found)


def test_without_augmentation_the_paper_has_other_errors():
    plain = dict(crop_padding=0, hflip=0.)
    assert compare(made_up(**plain)).paper == (11.66, 0.5, 13.63, 'Table 1', 500)
    assert compare(made_up(model='sd_resnet20_cifar.c10', **plain)).paper is None


@pytest.mark.parametrize(('error', 'rate', 'words'), [
    (6.25, 0.5, '1.00 points above the former'), (5., 0.5, '0.25 points below the former'),
    (6.25, 0., '0.16 points below the latter')])
def test_how_far_from_the_paper(error, rate, words):
    results = made_up(error, drop_path=rate)
    assert f'These weights are {words}.' in make_card(results, compare(results))


@pytest.mark.parametrize(('flags', 'words'), [
    ({}, "By the paper's recipe, `cifar10`, in 500 epochs."),
    (dict(epochs=8), "**Not in full.** By the paper's recipe, `cifar10`, in 8 epochs instead of 500."),
    (dict(drop_path=0.), "By the paper's recipe, `cifar10`, in 500 epochs; changed: drop_path 0.0."),
    (dict(model='sd_resnet38_cifar.c10'), "By the paper's recipe, `cifar10`, in 500 epochs."),
    (dict(global_batch_size=256),
     "By the paper's recipe, `cifar10`, in 500 epochs; changed: global_batch_size 256."),
    (dict(dataset='my/pictures'),
     "**Not the paper's recipe.** By the paper's recipe on other data, `cifar10`, in 500 epochs."),
    (dict(config='quickstart'), "**Not the paper's recipe.** By this project's recipe, `quickstart`, in "),
    (dict(config='/elsewhere/mine.yaml'), "**Not the paper's recipe.** By a user's recipe, `mine`, in "),
    # a file of the user's that has a recipe's name, and nothing changed of it
    (dict(config='/elsewhere/cifar10.yaml', lr=0.05),
     "By the paper's recipe, `cifar10`, in 500 epochs; changed: lr 0.05."),
], ids=str)
def test_whose_recipe_it_was_is_said(flags, words):
    results = made_up(**flags)
    if 'elsewhere' in flags.get('config', ''):
        results['changed_from_recipe'] = {}
    said = sections(make_card(results, compare(results)))['Training'].strip().splitlines()[0]
    assert said.startswith(words)


def test_changed_is_what_differs_from_the_recipe_of_today():
    """A recipe may be changed after a run by it: what was a change no longer is one, and the other way round."""
    results = made_up(smoothing=0.1)
    results['changed_from_recipe'] = dict(smoothing=0.1, momentum=0.9)
    results['args']['weight_decay'] = 3e-4
    assert compare(results).changed == dict(smoothing=0.1, weight_decay=3e-4)


def test_weights_of_other_data_get_a_tag_of_their_own():
    assert full_name(made_up()) == 'sd_resnet110_cifar.c10'
    assert full_name(made_up(dataset='uoft-cs/cifar10@main')) == 'sd_resnet110_cifar.c10'
    assert full_name(made_up(dataset='my/Pictures')) == 'sd_resnet110_cifar.sd_pictures'
    assert architecture('sd_resnet18.a1_in1k') == 'resnet18'  # which plain timm has
    assert architecture('sd_resnet20_cifar.c10') == 'sd_resnet20_cifar'


def test_nothing_was_selected_where_the_test_images_are_the_validation_images():
    results = made_up()
    card = make_card(results, compare(results))
    assert 'selected by them, not by the test images' in card
    results['held_out'] = 'nothing: the last epoch counts'
    card = make_card(results, compare(results))
    assert 'The last epoch counts' in card
    assert 'selected by them' not in card


# --- what users named


def parsed(card):
    """The kinds of what a Markdown parser finds behind the front matter, and its text outside of code."""
    tokens = MarkdownIt('commonmark').enable(['table', 'strikethrough']).parse(card.split('---\n', 2)[2])
    inline = [child for token in tokens for child in token.children or []]
    kinds = [token.type for token in (*tokens, *inline) if token.type not in ('text', 'text_special', 'softbreak')]
    return kinds, ' '.join(token.content for token in inline if token.type.startswith('text'))


ODD = ['# big', 'a | b | c', '<b onclick="x">y</b>', 'x\n\n# big\n\n| a | b |\n|---|---|\n| 1 | 2 |\n', '[x](http://a.b)',
       '![x](http://a.b/c.png)', '`x`', '*x*', '_x_', '**x**', '~~x~~', '&lt;x&gt;', '<!--', '\\', 'x\\|y', '```\nx']


def kinds_with(name):
    results = made_up(model='sd_resnet56_cifar', dataset=name, config=f'/elsewhere/{name.replace("/", "")}.yaml')
    results.update(dataset=name, test_split=name, data=dict(folder=name))
    results['args'].update(opt=name, sched=name, drop_path_schedule='linear')
    results['hardware'].update(device=name)
    comparison = compare(results)._replace(changed=dict(experiment=name, model_kwargs={'a': name}))
    return parsed(make_card(results, comparison))


@pytest.mark.parametrize('name', ODD)
def test_what_users_named_is_text(name):
    kinds, text = kinds_with(name)
    plain, _ = kinds_with('plain')
    assert kinds == plain
    words = ' '.join(name.split())
    assert words in ' '.join(text.split())


def test_usual_names_are_as_they_are():
    for name in ('cifar10_weights', 'Intel(R) Xeon(R) Processor, 2 cores', 'uoft-cs/cifar10', '0.5', "a 'b'"):
        assert as_text(name) == name
    assert as_text(0.5) == '0.5'


# --- snippets


def shapes(value):
    return [tuple(entry.shape) for entry in (value if isinstance(value, list) else [value])]


@each
def test_snippets_of_the_card_run_and_give_the_shapes_they_say(name):
    found = snippets(card_of(name))
    assert len(found) == 4
    for snippet in found:
        names = {}
        exec(snippet, names)
        said = re.search(r'^(\w+) = .*# (\(.*)$', snippet, re.MULTILINE)
        if said:
            assert shapes(names[said[1]]) == [tuple(map(int, shape.split(', ')))
                                              for shape in re.findall(r'\(([\d, ]+)\)', said[2])]
    assert sum('  # (' in snippet for snippet in found) == 3


def test_snippets_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one saves a network
    found = snippets((ROOT / 'README.md').read_text())
    assert found
    for snippet in found:
        exec(snippet, {})


@pytest.mark.slow
@pytest.mark.parametrize('path', [CARDS / NAMES[-1] / 'README.md', ROOT / 'README.md'],
                         ids=lambda path: path.parent.name)
def test_each_snippet_runs_by_itself(path, tmp_path):
    found = snippets(path.read_text())
    assert found
    for snippet in found:
        assert snippet.startswith('import timm_sd')
        subprocess.run([sys.executable, '-c', snippet], check=True, cwd=tmp_path)


# --- in processes of their own


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason='needs ../shared/data')
@each
def test_validate_reproduces_the_cards_error(name):
    results, run = results_of(name), bench if '20' in name else run_here
    folder = DATA / results['dataset'].rpartition('/')[2]
    key = ['--target-key', 'fine_label'] if name.endswith('.c100') else []
    result = run('validate.py', '--model', name, '--pretrained', '--data-dir', folder, *key)
    assert result.returncode == 0, result.stderr
    # other processors round differently: one image of 10,000 may fall on the other side
    assert json.loads(result.stdout)['top1_err'] == pytest.approx(results['test_best']['top1_err'], abs=0.021)

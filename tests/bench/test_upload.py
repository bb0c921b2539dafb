"""A publication is of one run, all of it, or nothing: weights of another run, two publishers, what is there already."""
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch

from harness.errors import UserError
from harness.repository import read_run
from harness.upload import UploadSettings, upload
from publish import compare
from support.commands import read_results, refused, weights
from support.published import (
    FILES,
    REPO,
    change,
    head,
    is_of,
    other_run,
    refused_with_news,
    repository,
    to_hub,
)

pytestmark = pytest.mark.usefixtures('scratch', 'waits')


# --- of one run


def mixed(run_folder, tmp_path, **results):
    other = other_run(run_folder, tmp_path / 'other', **results)
    (run_folder / 'model.safetensors').write_bytes((other / 'model.safetensors').read_bytes())


def damaged(run_folder, tmp_path):
    path = run_folder / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # a finite number, but another one
    path.write_bytes(content)


def cut_off(run_folder, tmp_path):
    path = run_folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-8])


def not_finite(run_folder, tmp_path):
    tensors = weights(run_folder)
    tensors['fc.bias'][3] = float('nan')
    change(run_folder, tensors)


def of_others(run_folder, tmp_path):
    safetensors.torch.save_file(weights(run_folder), run_folder / 'model.safetensors')


@pytest.mark.parametrize(('spoil', 'words'), [
    (mixed, 'holds files of two runs: seed of model.safetensors is 1, of results.json 0'),
    (damaged, 'has another SHA-256 than results.json says'),
    (cut_off, 'no whole safetensors file'),
    (not_finite, 'fc.bias holds numbers that are not finite'),
    (of_others, 'does not say which run it is of'),
], ids=lambda value: getattr(value, '__name__', ''))
@pytest.mark.parametrize('target', [['--repo', REPO], ['--repo', REPO, '--dry-run'], ['--bundle']])
def test_wrong_weights_are_not_published(hub, signed_in, run_folder, tmp_path, monkeypatch, spoil, words, target):
    monkeypatch.setattr('publish.PRETRAINED', tmp_path / 'pretrained')
    monkeypatch.setattr('publish.CARDS', tmp_path / 'cards')
    spoil(run_folder, tmp_path)
    assert words in refused('publish.py', run_folder, *target)
    assert hub.requests == []
    assert not (run_folder / 'hub').exists()
    assert not (tmp_path / 'cards').exists()
    assert not (tmp_path / 'pretrained').exists()


def test_the_curves_are_drawn_from_the_runs_own_summary(hub, signed_in, run_folder):
    (run_folder / 'curves.png').write_bytes(b'of another run')
    to_hub(run_folder, '--repo', REPO)
    assert head(repository(hub))['curves.png'].startswith(b'\x89PNG')


def test_a_dry_run_is_whole_or_not_there(hub, run_folder):
    with mock.patch('harness.repository.save_config_for_hf', side_effect=UserError('in the middle')):
        assert 'in the middle' in refused('publish.py', run_folder, '--repo', REPO, '--dry-run')
    assert not list(run_folder.glob('*hub*'))
    to_hub(run_folder, '--repo', REPO, '--dry-run')
    to_hub(run_folder, '--repo', REPO, '--dry-run')
    assert {path.name for path in (run_folder / 'hub').iterdir()} == FILES
    (run_folder / 'hub' / 'notes.txt').write_text('mine')
    assert 'holds notes.txt' in refused('publish.py', run_folder, '--repo', REPO, '--dry-run')
    assert (run_folder / 'hub' / 'notes.txt').read_text() == 'mine'
    assert not list(run_folder.glob('.hub*'))


def test_the_old_folder_comes_back_where_the_new_one_can_not_take_its_place(run_folder, monkeypatch):
    to_hub(run_folder, '--repo', REPO, '--dry-run')
    rename = Path.rename

    def fails(path, target):
        if path.name == '.hub.new':
            raise OSError(28, 'No space left on device')
        return rename(path, target)
    monkeypatch.setattr(Path, 'rename', fails)
    assert 'No space left' in refused('publish.py', run_folder, '--repo', REPO, '--dry-run')
    assert {path.name for path in (run_folder / 'hub').iterdir()} == FILES
    assert not list(run_folder.glob('.hub*'))


def test_a_run_that_is_written_anew_meanwhile_is_not_published(hub, signed_in, run_folder, tmp_path):
    other = other_run(run_folder, tmp_path / 'other')

    def finish(*args):
        shutil.copytree(other, run_folder, dirs_exist_ok=True)
    with mock.patch('harness.repository.save_gates', side_effect=finish):
        said = refused('publish.py', run_folder, '--repo', REPO)
    assert 'was written anew meanwhile; run this again' in said
    assert hub.requests == []


def test_a_run_whose_weights_hold_a_path_is_not_published(hub, signed_in, run_folder):
    changed = dict(read_results(run_folder)['changed_from_recipe'], dataset='/home/me/secret/pets')
    change(run_folder, changed_from_recipe=changed, args=dict(dataset='/home/me/secret/pets'))
    said = refused('publish.py', run_folder, '--repo', REPO)
    assert 'has a path of this machine in its weights: an older version wrote it' in said
    assert hub.requests == []


@pytest.mark.parametrize(('args', 'words'), [
    (['--repo', "x'); import os #"], '--repo: '),
    (['--repo', 'a/b/c'], '--repo: '),
    (['--bundle', '--dry-run'], 'give one of them'),
    (['--bundle', '--repo', REPO], 'give one of them'),
    (['--repo', REPO, '--create-pr', '--revision', 'v2'], '--create-pr opens a pull request to main'),
])
def test_flags_that_make_no_sense(hub, signed_in, run_folder, args, words):
    assert words in refused('publish.py', run_folder, *args)
    assert words in refused('publish.py', run_folder, *args, *([] if '--bundle' in args else ['--private']))
    assert hub.requests == []


def test_a_servers_words_are_one_line(hub, signed_in, run_folder):
    hub.fail(400, 'preupload', X_Error_Message='one\x1b[31m two')
    said = refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert '\x1b' not in said
    assert 'the Hub answers 400 one [31m two' in said


# --- two publishers


def publish_meanwhile(folder):
    """In a thread of the server, by the client that is there."""
    results = read_run(folder)
    with mock.patch('harness.upload.limit_time'):
        upload(folder, results, compare(results), REPO, UploadSettings())


def test_the_second_of_two_publishers_is_told(hub, signed_in, run_folder, tmp_path):
    other = other_run(run_folder, tmp_path / 'other')
    to_hub(run_folder, '--repo', REPO)
    change(run_folder, epoch_seconds=1.)
    hub.before_commit = lambda: publish_meanwhile(other)
    said = refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert 'another commit came meanwhile; look whether yours is under it, and run this again if not' in said
    assert is_of(head(repository(hub)), other)
    to_hub(run_folder, '--repo', REPO)
    assert is_of(head(repository(hub)), run_folder)


def test_two_publishers_who_both_make_the_repository(hub, signed_in, run_folder, tmp_path):
    other = other_run(run_folder, tmp_path / 'other')
    hub.before_commit = lambda: publish_meanwhile(other)
    assert 'another commit came meanwhile' in refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert is_of(head(repository(hub)), other)


# --- what is there already


def test_private_is_not_put_into_a_public_repository(hub, signed_in, run_folder):
    hub.repo(REPO).commit({'.gitattributes': b''})
    assert f'--private is given, and {REPO} is public' in refused('publish.py', run_folder, '--repo', REPO, '--private')
    assert set(head(repository(hub))) == {'.gitattributes'}
    hub.repo('our/hidden', private=True).commit({'.gitattributes': b''})
    to_hub(run_folder, '--repo', 'our/hidden', '--private')


def test_a_better_run_is_replaced_when_asked(hub, signed_in, run_folder, tmp_path):
    error = read_results(run_folder)['val_top1_err']
    better = other_run(run_folder, tmp_path / 'better', val_top1_err=error - 1)
    to_hub(better, '--repo', REPO)
    oid = repository(hub).branches['main']
    said = refused('publish.py', run_folder, '--repo', REPO)
    theirs = f'sd_resnet20_cifar on uoft-cs/cifar10, validation error {error - 1} %; this one has {error} %'
    assert f'a better run is there, {theirs}' in said
    assert '--overwrite' in said
    assert '--create-pr' in said
    assert repository(hub).branches['main'] == oid
    to_hub(run_folder, '--repo', REPO, '--create-pr')
    assert repository(hub).branches['main'] == oid
    assert is_of(head(repository(hub), 'refs/pr/1'), run_folder)
    result = to_hub(run_folder, '--repo', REPO, '--overwrite')
    assert f'{REPO}: replaces {theirs}' in result.stderr
    assert is_of(head(repository(hub)), run_folder)


def test_a_worse_run_is_replaced_and_said_so(hub, signed_in, run_folder, tmp_path):
    error = read_results(run_folder)['val_top1_err']
    worse = other_run(run_folder, tmp_path / 'worse', val_top1_err=error + 1)
    to_hub(worse, '--repo', REPO)
    result = to_hub(run_folder, '--repo', REPO)
    assert f'validation error {error + 1} %; this one has {error} %' in result.stderr
    assert f'{REPO}: replaces README.md, model.safetensors, results.json' in result.stderr
    assert is_of(head(repository(hub)), run_folder)


@pytest.mark.parametrize('other', [dict(dataset='uoft-cs/cifar100'), dict(model='sd_resnet32_cifar')])
def test_a_run_of_another_kind_is_replaced_when_asked(hub, signed_in, run_folder, other):
    to_hub(run_folder, '--repo', REPO)
    files = head(repository(hub))
    results = dict(json.loads(files['results.json']), **other)
    repository(hub).commit({'results.json': json.dumps(results).encode(), 'model.safetensors': b'theirs'})
    assert f'another run is there, {results["model"]} on {results["dataset"]}' in refused(
        'publish.py', run_folder, '--repo', REPO)
    to_hub(run_folder, '--repo', REPO, '--overwrite')
    assert is_of(head(repository(hub)), run_folder)


@pytest.mark.parametrize('content', [b'{', b'[]', b'{}', b'[' * 10 ** 5, b'\xff', None])
def test_weights_that_tell_nothing_are_replaced_when_asked(hub, signed_in, run_folder, content):
    hub.repo(REPO).commit({'.gitattributes': b'', 'results.json': content, 'model.safetensors': b'theirs'})
    assert 'weights of an unknown run are there: give --overwrite' in refused('publish.py', run_folder, '--repo', REPO)
    to_hub(run_folder, '--repo', REPO, '--overwrite')
    assert is_of(head(repository(hub)), run_folder)


def test_what_is_there_is_told_in_one_line(hub, signed_in, run_folder):
    results = dict(read_results(run_folder), model='a\x1b[2J\nb', dataset=7)
    hub.repo(REPO).commit({'results.json': json.dumps(results).encode(), 'model.safetensors': b'x', 'a\nb.bin': b'x'})
    assert 'another run is there, a [2J b on 7' in refused('publish.py', run_folder, '--repo', REPO)
    said = to_hub(run_folder, '--repo', REPO, '--overwrite').stderr
    assert f'{REPO}: removes a b.bin' in said
    assert '\x1b' not in said


def test_what_is_there_already_is_said(hub, signed_in, run_folder):
    to_hub(run_folder, '--repo', REPO)
    for args in ([], ['--create-pr']):
        assert 'holds all of it already, so there is no new commit' in to_hub(run_folder, '--repo', REPO, *args).stderr


def test_a_pull_request_waits_for_its_turn(hub, signed_in, run_folder, waits):
    hub.fail(429, 'POST .*/commit/', times=1, Retry_After='3')
    to_hub(run_folder, '--repo', REPO, '--create-pr')
    assert waits == [3]


@pytest.mark.parametrize('kind', ['file', 'link'])
def test_what_is_no_folder_is_left_alone(run_folder, tmp_path, kind):
    hub = run_folder / 'hub'
    if kind == 'file':
        hub.write_text('mine')
    else:
        (tmp_path / 'elsewhere').mkdir()
        hub.symlink_to(tmp_path / 'elsewhere')
    assert 'is no folder; move it away' in refused('publish.py', run_folder, '--repo', REPO, '--dry-run')
    assert hub.is_symlink() == (kind == 'link')
    assert not list(run_folder.glob('.hub*'))


def test_what_a_person_wrote_is_kept(hub, signed_in, run_folder):
    theirs = {'README.md': b'by hand', 'pytorch_model.bin': b'stale', 'LICENSE': b'theirs'}
    hub.repo(REPO).commit(theirs)
    result = to_hub(run_folder, '--repo', REPO)
    files = head(repository(hub))
    assert {name: files[name] for name in theirs} == theirs
    assert set(files) == FILES | set(theirs)
    assert 'keeps README.md, which a person wrote: --overwrite replaces it' in result.stderr
    assert 'keeps pytorch_model.bin, which this run did not make: --overwrite removes such weights' in result.stderr
    assert 'keeps LICENSE' in result.stderr
    result = to_hub(run_folder, '--repo', REPO, '--overwrite')
    files = head(repository(hub))
    assert set(files) == FILES | {'LICENSE'}
    assert is_of(files, run_folder)
    assert 'removes pytorch_model.bin' in result.stderr
    assert 'replaces README.md' in result.stderr


def test_our_own_readme_is_replaced_until_a_person_edits_it(hub, signed_in, run_folder):
    to_hub(run_folder, '--repo', REPO)
    change(run_folder, epoch_seconds=1.)
    to_hub(run_folder, '--repo', REPO)
    assert b' 1 s an epoch' in head(repository(hub))['README.md']
    repository(hub).commit({'README.md': b'edited'}, title='Update README.md')
    to_hub(run_folder, '--repo', REPO)
    assert head(repository(hub))['README.md'] == b'edited'

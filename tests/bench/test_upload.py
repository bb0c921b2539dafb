"""A publication is of one run, all of it, or nothing: two publishers, what is there already, faults of the Hub."""
import json
import re
import shutil
import signal
import subprocess
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from huggingface_hub.utils import get_session

from harness import hub_client
from harness.errors import UserError
from harness.repository import read_run
from harness.upload import UploadSettings, upload
from publish import compare
from support.commands import bench, command, read_results, refused, run_here, weights
from support.hub_server import Hub
from support.published import FILES, change, head, to_hub
from support.waiting import hear_sigint, wait_until

REPO = 'our/sd'


@pytest.fixture(autouse=True)
def scratch(monkeypatch, tmp_path):
    """Its own cache, and its own folder of temporary files, which is empty at the end."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'scratch'
    folder.mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(folder))
    monkeypatch.setenv('TMPDIR', str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds between two questions, which no test waits for."""
    waited = []
    clock = types.SimpleNamespace(**{**vars(time), 'sleep': waited.append})
    for module in ('timm_sd.asking', 'harness.upload'):
        monkeypatch.setattr(f'{module}.time', clock)
    return waited


def other_run(folder, place, **results):
    """Another finished run: other weights, and a better or worse error."""
    shutil.copytree(folder, place)
    torch.manual_seed(1)
    change(place, {name: torch.randn_like(x) if x.is_floating_point() else x for name, x in weights(folder).items()},
           seed=1, **results)
    return place


def repository(hub):
    return hub.repos['models', REPO]


def is_of(files, folder):
    """Whether weights, results and card are those of a run."""
    of_results = json.loads(files['results.json'])['seed'] == read_results(folder)['seed']
    of_weights = files['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    of_card = f'| seed | {read_results(folder)["seed"]} |' in files['README.md'].decode()
    return of_weights and of_results and of_card


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


def refused_with_news(script, *args):
    """The error of a script that said something before it."""
    result = run_here(script, *args)
    assert (result.returncode, result.stdout) == (2, ''), result
    assert result.stderr.splitlines()[-1].startswith(f'{script}: error: ')
    assert 'Traceback' not in result.stderr
    return result.stderr.splitlines()[-1]


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


# --- faults of the Hub


PHASES = ['GET /api/models/our/sd$', 'create', 'tree', 'preupload', 'objects/batch', 'PUT /lfs', 'validate-yaml',
          'POST .*/commit/']


@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize(('status', 'headers'), [(500, {}), (503, {}), (429, dict(Retry_After='3'))])
def test_what_passes_is_waited_for(hub, signed_in, run_folder, waits, phase, status, headers):
    hub.fail(status, phase, times=1, **headers)
    to_hub(run_folder, '--repo', REPO)
    assert is_of(head(repository(hub)), run_folder)
    assert waits == [3 if headers else 1]


@pytest.mark.parametrize('phase', PHASES)
def test_who_is_to_wait_for_hours_is_told(hub, signed_in, run_folder, waits, phase):
    hub.fail(429, phase, Retry_After='3600')
    assert 'the Hub answers 429' in refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert waits == []


@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize('status', [400, 401, 403, 409, 500, 'lost', 'truncate'])
def test_what_lasts_is_told_in_one_line(hub, signed_in, run_folder, phase, status):
    if (phase, status) == ('create', 409):
        return  # it says that the repository is there
    hub.fail(status, phase)
    result = run_here('publish.py', run_folder, '--repo', REPO)
    repo = hub.repos.get(('models', REPO))
    published = repo is not None and 'model.safetensors' in head(repo)
    if result.returncode == 0:  # what the Hub did not say was found there
        assert published
        return
    assert result.returncode == 2, result.stderr
    said = result.stderr.splitlines()[-1]
    assert f'--repo {REPO}' in said
    assert 'Traceback' not in result.stderr
    assert not published
    assert ('log in' in said) == (status in (401, 403))


@pytest.mark.parametrize('fault', ['lost', 'truncate', 'late'])
def test_a_commit_whose_answer_is_lost_is_looked_for(hub, signed_in, run_folder, monkeypatch, fault):
    monkeypatch.setattr(hub_client, 'ANSWER_SECONDS', 0.5)
    monkeypatch.setattr('harness.upload.time', time)
    hub.fail(fault, 'POST .*/commit/')
    result = to_hub(run_folder, '--repo', REPO)
    assert f'hf_hub_id: {REPO}@{repository(hub).branches["main"]}' in result.stdout
    assert is_of(head(repository(hub)), run_folder)
    assert len([request for request in hub.requests if '/commit/' in request]) == 1


@pytest.mark.parametrize(('fault', 'why'), [('silent', 'no answer from 127.0.0.1'), (502, 'the Hub answers 502')])
def test_a_commit_that_is_not_there_may_still_come(hub, signed_in, run_folder, monkeypatch, fault, why):
    monkeypatch.setattr(hub_client, 'ANSWER_SECONDS', 0.5)
    hub.fail(fault, 'POST .*/commit/')
    said = refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert f'the commit had no good answer ({why}; try again later), and may still come: look at {hub.url}' in said
    assert 'can not be published' not in said
    assert set(head(repository(hub))) == {'.gitattributes'}


def test_where_nobody_knows_whether_it_is_there_that_is_said(hub, signed_in, run_folder):
    hub.fail('lost', 'POST .*/commit/')
    hub.before_commit = lambda: hub.fail(403, 'GET')
    said = refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert f'and may still come: look at {hub.url}/{REPO}, or run this again' in said
    assert 'can not be published' not in said
    hub.heal()
    oid = repository(hub).branches['main']
    to_hub(run_folder, '--repo', REPO)
    assert repository(hub).branches['main'] == oid


def test_a_pull_request_whose_answer_is_lost(hub, signed_in, run_folder):
    hub.fail('lost', 'POST .*/commit/')
    said = refused_with_news('publish.py', run_folder, '--repo', REPO, '--create-pr')
    assert f'and may still come: look at {hub.url}/{REPO}/discussions' in said


def test_there_is_one_pull_request(hub, signed_in, run_folder):
    hub.fail(504, 'POST .*/commit/', times=1)
    refused_with_news('publish.py', run_folder, '--repo', REPO, '--create-pr')
    assert len([request for request in hub.requests if '/commit/' in request]) == 1


@pytest.mark.parametrize('phase', PHASES)
def test_a_hub_that_falls_silent_is_given_up(hub, signed_in, run_folder, monkeypatch, phase):
    monkeypatch.setattr(hub_client, 'ANSWER_SECONDS', 0.5)
    hub.fail('silent', phase)
    assert 'no answer from 127.0.0.1' in refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert ('models', REPO) not in hub.repos or 'model.safetensors' not in head(repository(hub))


def test_each_question_has_the_same_time_limit(hub):
    """httpx alone has five seconds, within which a commit need not be answered, and huggingface_hub none."""
    hub_client.limit_time()
    client, limits = get_session(), []
    client.event_hooks['request'].append(lambda request: limits.append(request.extensions['timeout']))
    try:
        client.get(hub.url)
        client.get(hub.url, timeout=None)
        client.get(hub.url, timeout=60)
        client.get(hub.url, timeout=3)
    finally:
        client.event_hooks['request'].pop()
        hub_client.limit_time()
    assert [set(limit.values()) for limit in limits] == [{20.}, {20.}, {20.}, {3}]
    assert hub_client.ANSWER_SECONDS == 20


@pytest.mark.parametrize('token', ['hf_sécret', 'hf_se cret'])
def test_a_token_of_odd_characters_is_not_printed(hub, run_folder, monkeypatch, token):
    monkeypatch.setenv('HF_TOKEN', token)
    said = refused('publish.py', run_folder, '--repo', REPO)
    assert 'the token has characters that no token has' in said
    assert 'hf_s' not in said
    assert hub.requests == []


# --- in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize('fault', [403, 503, 'lost', 'silent'])
def test_a_password_in_the_address_is_not_printed(hub, signed_in, run_folder, monkeypatch, fault):
    monkeypatch.setenv('HF_ENDPOINT', hub.url.replace('//', '//me:tiptop@'))
    hub.fail(fault)
    result = bench('publish.py', run_folder, '--repo', REPO, timeout=100)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()[-1:]) == 1
    assert 'tiptop' not in result.stdout + result.stderr
    assert Hub.TOKEN not in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize('phase', ['GET /api/models/our/sd$', 'PUT /lfs', 'POST .*/commit/'])
def test_a_signal_ends_it_in_one_line(hub, signed_in, run_folder, scratch, number, status, phase):
    hub.repo(REPO).commit({'.gitattributes': b''})
    hub.fail('silent', phase)
    with subprocess.Popen(command('publish.py', run_folder, '--repo', REPO), stderr=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True,
                          preexec_fn=hear_sigint) as process:
        try:
            wait_until(lambda: any(re.search(phase, request) for request in hub.requests), process=process)
            assert phase.startswith('GET') or list(Path(scratch).iterdir())
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status
    assert stdout == ''
    assert stderr.splitlines()[-1] == f'publish.py: stopped by {signal.Signals(number).name}'
    assert 'Traceback' not in stderr
    assert set(head(repository(hub))) == {'.gitattributes'}

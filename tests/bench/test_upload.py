"""A publication is of one run, all of it, or nothing: two publishers, what is there already, faults of the Hub."""
import json
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from harness import hub_client
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
    monkeypatch.setattr('timm_sd.download.time.sleep', waited.append)
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


def test_a_dry_run_is_whole_or_not_there(hub, run_folder, monkeypatch):
    monkeypatch.setattr('harness.repository.save_for_hf', None)  # fails in the middle
    assert run_here_fails('publish.py', run_folder, '--repo', REPO, '--dry-run')
    assert not list(run_folder.glob('*hub*'))
    monkeypatch.undo()
    to_hub(run_folder, '--repo', REPO, '--dry-run')
    to_hub(run_folder, '--repo', REPO, '--dry-run')
    assert {path.name for path in (run_folder / 'hub').iterdir()} == FILES
    (run_folder / 'hub' / 'notes.txt').write_text('mine')
    assert 'holds notes.txt' in refused('publish.py', run_folder, '--repo', REPO, '--dry-run')
    assert (run_folder / 'hub' / 'notes.txt').read_text() == 'mine'
    assert not list(run_folder.glob('.hub*'))


def run_here_fails(*args):
    try:
        return run_here(*args).returncode
    except TypeError:
        return True


# --- two publishers


def publish_meanwhile(folder):
    results = read_run(folder)
    upload(folder, results, compare(results), REPO, UploadSettings())


def test_the_second_of_two_publishers_is_told(hub, signed_in, run_folder, tmp_path):
    other = other_run(run_folder, tmp_path / 'other')
    to_hub(run_folder, '--repo', REPO)
    change(run_folder, epoch_seconds=1.)
    hub.before_commit = lambda: publish_meanwhile(other)
    said = refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert 'another commit came meanwhile, and nothing was published; look at it, and run this again' in said
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
    assert f'a better run is there, a run with validation error {error - 1:.2f} %; this one has {error:.2f} %' in said
    assert '--overwrite' in said
    assert '--create-pr' in said
    assert repository(hub).branches['main'] == oid
    to_hub(run_folder, '--repo', REPO, '--create-pr')
    assert repository(hub).branches['main'] == oid
    assert is_of(head(repository(hub), 'refs/pr/1'), run_folder)
    result = to_hub(run_folder, '--repo', REPO, '--overwrite')
    assert f'{REPO}: replaces a run with validation error {error - 1:.2f} %' in result.stderr
    assert is_of(head(repository(hub)), run_folder)


def test_a_worse_run_is_replaced_and_said_so(hub, signed_in, run_folder, tmp_path):
    error = read_results(run_folder)['val_top1_err']
    worse = other_run(run_folder, tmp_path / 'worse', val_top1_err=error + 1)
    to_hub(worse, '--repo', REPO)
    result = to_hub(run_folder, '--repo', REPO)
    assert f'{REPO}: replaces a run with validation error {error + 1:.2f} %; this one has {error:.2f}' in result.stderr
    assert f'{REPO}: replaces README.md, model.safetensors, results.json' in result.stderr
    assert is_of(head(repository(hub)), run_folder)


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
def test_what_passes_is_waited_for(hub, signed_in, run_folder, waits, monkeypatch, phase, status, headers):
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', waits.append)
    hub.fail(status, phase, times=1, **headers)
    to_hub(run_folder, '--repo', REPO)
    assert is_of(head(repository(hub)), run_folder)
    assert waits


@pytest.mark.parametrize('phase', PHASES)
@pytest.mark.parametrize('status', [400, 401, 403, 409, 500, 'lost', 'truncate'])
def test_what_lasts_is_told_in_one_line(hub, signed_in, run_folder, monkeypatch, phase, status):
    if (phase, status) == ('create', 409):
        return  # it says that the repository is there
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)
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


@pytest.mark.parametrize('fault', ['lost', 'truncate', 'silent', 502])
def test_a_commit_whose_answer_is_lost_is_looked_for(hub, signed_in, run_folder, monkeypatch, fault):
    monkeypatch.setattr(hub_client, 'ANSWER_SECONDS', 0.5)
    if fault in ('lost', 'truncate'):
        hub.fail(fault, 'POST .*/commit/')
        result = to_hub(run_folder, '--repo', REPO)
        assert f'hf_hub_id: {REPO}@{repository(hub).branches["main"]}' in result.stdout
        assert is_of(head(repository(hub)), run_folder)
    else:  # the Hub did nothing
        hub.fail(fault, 'POST .*/commit/')
        assert 'can not be published' in refused_with_news('publish.py', run_folder, '--repo', REPO)
        assert set(head(repository(hub))) == {'.gitattributes'}


def test_where_nobody_knows_whether_it_is_there_that_is_said(hub, signed_in, run_folder):
    hub.fail('lost', 'POST .*/commit/')
    hub.before_commit = lambda: hub.fail(403, 'GET')
    said = refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert 'no answer came to the commit' in said
    assert f'nobody knows whether it is there: look at {hub.url}/{REPO}, or run this again' in said
    assert 'can not be published' not in said
    hub.heal()
    oid = repository(hub).branches['main']
    to_hub(run_folder, '--repo', REPO)
    assert repository(hub).branches['main'] == oid


def test_a_pull_request_whose_answer_is_lost(hub, signed_in, run_folder):
    hub.fail('lost', 'POST .*/commit/')
    said = refused_with_news('publish.py', run_folder, '--repo', REPO, '--create-pr')
    assert f'nobody knows whether it is there: look at {hub.url}/{REPO}/discussions' in said


@pytest.mark.parametrize('phase', PHASES)
def test_a_hub_that_falls_silent_is_given_up(hub, signed_in, run_folder, monkeypatch, phase):
    monkeypatch.setattr(hub_client, 'ANSWER_SECONDS', 0.5)
    assert hub_client.ANSWER_SECONDS < 30
    hub.fail('silent', phase)
    assert 'no answer from 127.0.0.1' in refused_with_news('publish.py', run_folder, '--repo', REPO)
    assert ('models', REPO) not in hub.repos or 'model.safetensors' not in head(repository(hub))


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

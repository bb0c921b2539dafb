"""bench/publish.py against a Hub that fails, falls silent or loses an answer, and a signal in the middle."""
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from huggingface_hub.utils import get_session

from harness import hub_client
from support.commands import bench, command, refused, run_here
from support.hub_server import Hub
from support.published import (
    REPO,
    head,
    is_of,
    refused_with_news,
    repository,
    to_hub,
)
from support.waiting import hear_sigint, wait_until

pytestmark = pytest.mark.usefixtures('scratch', 'waits')


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
    last = f'publish.py: stopped by {signal.Signals(number).name}; to go on, run the same line again'
    assert stderr.splitlines()[-1] == last
    assert 'Traceback' not in stderr
    assert set(head(repository(hub))) == {'.gitattributes'}

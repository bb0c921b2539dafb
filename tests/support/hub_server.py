"""A small Hugging Face Hub on loopback, for real clients: repositories in memory, and faults on demand.

Models and data sets; create, commit, resolve, tree and info, as huggingface_hub, datasets and timm ask for them.
Weights are uploaded by LFS, as on the real one.
"""
import base64
import hashlib
import json
import math
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


@dataclass
class Repo:
    """One repository: commits by oid, branches, who may see it, and the title of each file's last commit."""
    private: bool = False
    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    titles: dict = field(default_factory=dict)

    def commit(self, files, branch='main', title='by hand', parent=None):
        """A new commit on top of `branch`, or of another parent; its oid, by which caches know what they hold.

        A file of None is deleted.
        """
        content = {**self.commits.get(parent or self.branches.get(branch), {}), **files}
        content = {path: blob for path, blob in content.items() if blob is not None}
        blobs = sorted((path, blob_id(path, blob)) for path, blob in content.items())
        oid = hashlib.sha1(f'{branch}{len(self.commits)}{blobs}'.encode()).hexdigest()
        self.commits[oid] = content
        self.branches[branch] = oid
        self.titles.update(dict.fromkeys(files, title))
        return oid


@dataclass
class Fault:
    """What befalls the requests whose 'METHOD path' holds the pattern `where`, the first `times` of them.

    `kind` is a status, with headers, or 'silent' (accepts, never answers), 'lost' (does it, and says nothing),
    'truncate' (breaks off the body), 'corrupt' (changes the body's last bytes), 'slow' (a second between two parts), or
    'late' (does it after a second and a half).
    """
    kind: int | str
    where: str = ''
    times: float = math.inf
    headers: dict = field(default_factory=dict)


def is_lfs(path):
    return path.endswith('.safetensors')


def blob_id(path, content):
    """What the Hub knows a file by: git's blob id, or the SHA-256 of what lies in LFS."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server."""
    daemon_threads = True
    TOKEN = 'hf_secret'

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.released = threading.Event()
        self.reset()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def reset(self):
        """Makes it empty, and without a fault; who waits for a silent answer is let go."""
        self.released.set()
        self.released = threading.Event()
        self.repos, self.lfs, self.faults, self.requests, self.before_commit = {}, {}, [], [], None

    def fail(self, kind, where='', times=math.inf, **headers):
        """Adds a fault; see `Fault`."""
        self.faults.append(Fault(kind, where, times, headers))

    def heal(self):
        """Takes all faults away."""
        self.faults.clear()

    def fault_of(self, request):
        """The first fault that befalls a request; None where none does."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.where, request):
                fault.times -= 1
                return fault
        return None

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server_port}'

    def repo(self, repo_id, kind='models', private=False):
        return self.repos.setdefault((kind, repo_id), Repo(private))


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path = unquote(urlparse(self.path).path)
        request = f'{self.command} {path}'
        self.server.requests.append(request)
        fault = self.server.fault_of(request)
        self.kind = fault.kind if fault else None
        if self.kind == 'silent':
            self.server.released.wait(600)
            self.close_connection = True
            return
        if self.kind == 'late':
            time.sleep(1.5)
        if isinstance(self.kind, int):
            self.send(self.kind, b'{"error": ""}', **fault.headers)
            return
        for pattern, method in (
                (r'/api/repos/create', self.create),
                (r'/api/validate-yaml', lambda body: self.json(dict(errors=[], warnings=[]))),
                (r'/api/whoami-v2', lambda body: self.json(dict(type='user', name='me', orgs=[]))),
                (r'/api/(models|datasets)/([^/]+/[^/]+)/preupload/(.+)', self.preupload),
                (r'/api/(models|datasets)/([^/]+/[^/]+)/commit/(.+)', self.commit),
                (r'/api/(models|datasets)/([^/]+/[^/]+)/branch/(.+)', self.branch),
                (r'/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?(.*)', self.tree),
                (r'/api/(models|datasets)/([^/]+/[^/]+)/paths-info/(.+)', self.paths_info),
                (r'/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?', self.info),
                (r'/(?:datasets/)?[^/]+/[^/]+\.git/info/lfs/objects/batch', self.lfs_batch),
                (r'/lfs/(.+)', self.lfs_put),
                (r'/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)', self.resolve)):
            match = re.fullmatch(pattern, path)
            if match:
                method(body, *match.groups())
                return
        self.error(404, '')

    # --- answers

    def send(self, status, content=b'', **headers):
        if self.kind == 'lost':
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        if self.command == 'HEAD':
            return
        if self.kind == 'truncate':
            content = content[:len(content) // 2]
            self.close_connection = True
        if self.kind == 'corrupt':
            content = content[:-4] + bytes(255 - byte for byte in content[-4:])
        parts = 4 if self.kind == 'slow' else 1
        for start in range(0, len(content), -(-len(content) // parts) or 1):
            time.sleep(parts > 1)
            self.wfile.write(content[start:start + -(-len(content) // parts)])

    def json(self, value, status=200):
        self.send(status, json.dumps(value).encode(), Content_Type='application/json')

    def error(self, status, code):
        self.send(status, json.dumps(dict(error=code)).encode(), X_Error_Code=code, X_Error_Message=code)

    def files(self, kind, repo_id, revision):
        """The repository, the oid and files of a revision; None after an error was sent."""
        repo = self.server.repos.get((kind, repo_id))
        signed_in = self.headers.get('Authorization') == f'Bearer {self.server.TOKEN}'
        if repo is None or repo.private and not signed_in:
            self.error(401 if not signed_in else 404, 'RepoNotFound')
            return None
        oid = repo.branches.get(revision or 'main', revision)
        if oid not in repo.commits and revision not in (None, 'main'):
            self.error(404, 'RevisionNotFound')
            return None
        return repo, oid or '', repo.commits.get(oid, {})

    # --- writing: only with the token

    def create(self, body):
        asked = json.loads(body)
        if self.headers.get('Authorization') != f'Bearer {self.server.TOKEN}':
            self.error(401, '')
            return
        repo_id = f'{asked.get("organization") or "me"}/{asked["name"]}'
        key = f'{asked.get("type") or "model"}s', repo_id
        answer = dict(url=f'{self.server.url}/{repo_id}', name=repo_id, id=repo_id)
        if key in self.server.repos:
            self.json(answer, 409)
            return
        private = asked.get('visibility') == 'private' or bool(asked.get('private'))
        self.server.repo(repo_id, key[0], private).commit({'.gitattributes': b''})
        self.json(answer)

    def branch(self, body, kind, repo_id, name):
        repo = self.server.repos[kind, repo_id]
        if name in repo.branches:
            self.error(409, '')
            return
        repo.branches[name] = repo.branches.get('main', '')
        self.json({})

    def preupload(self, body, kind, repo_id, revision):
        found = self.files(kind, repo_id, revision)
        if found:
            files = [dict(path=path, uploadMode='lfs' if is_lfs(path) else 'regular', shouldIgnore=False,
                          oid=blob_id(path, found[2][path]) if path in found[2] else None)
                     for path in (file['path'] for file in json.loads(body)['files'])]
            self.json(dict(files=files))

    def lfs_batch(self, body):
        objects = [dict(oid=asked['oid'], size=asked['size'], actions=dict(upload=dict(
            href=f'{self.server.url}/lfs/{asked["oid"]}'))) for asked in json.loads(body)['objects']]
        self.json(dict(transfer='basic', objects=objects))

    def lfs_put(self, body, oid):
        self.server.lfs[oid] = body
        self.send(200)

    def commit(self, body, kind, repo_id, revision):
        if self.server.before_commit:  # what another one does meanwhile
            self.server.before_commit, act = None, self.server.before_commit
            act()
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line['value']['path']: base64.b64decode(line['value']['content'])
                 for line in lines if line['key'] == 'file'}
        files |= {line['value']['path']: self.server.lfs[line['value']['oid']]
                  for line in lines if line['key'] == 'lfsFile'}
        files |= {line['value']['path']: None for line in lines if line['key'] == 'deletedFile'}
        repo, header = self.server.repos[kind, repo_id], lines[0]['value']
        is_pull_request, parent = 'create_pr=1' in self.path, header.get('parentCommit')
        if parent and not is_pull_request and repo.branches[revision] != parent:
            self.error(412, '')
            return
        oid = repo.commit(files, 'refs/pr/1' if is_pull_request else revision, header['summary'], parent)
        answer = dict(success=True, commitOid=oid, commitUrl=f'{self.server.url}/{repo_id}/commit/{oid}', hookOutput='')
        if is_pull_request:
            answer['pullRequestUrl'] = f'{self.server.url}/{repo_id}/discussions/1'
        self.json(answer)

    # --- reading

    def info(self, body, kind, repo_id, revision):
        found = self.files(kind, repo_id, revision)
        if found:
            repo, oid, files = found
            self.json(dict(_id='1', id=repo_id, sha=oid, private=repo.private, tags=[], downloads=0, likes=0,
                           siblings=[dict(rfilename=path) for path in files]))

    @staticmethod
    def entry(path, content, title=''):
        lfs = dict(lfs=dict(oid=blob_id(path, content), size=len(content), pointerSize=130)) if is_lfs(path) else {}
        return dict(type='file', path=path, size=len(content), oid=blob_id(path, content), **lfs,
                    lastCommit=dict(id='0' * 40, title=title, date='2026-01-01T00:00:00.000Z'))

    def tree(self, body, kind, repo_id, revision, folder):
        found = self.files(kind, repo_id, revision)
        if found:
            entries = [self.entry(path, content, found[0].titles.get(path, '')) for path, content in found[2].items()
                       if not folder or path.startswith(f'{folder}/')]
            if entries or not folder:
                self.json(entries)
            else:
                self.error(404, 'EntryNotFound')

    def paths_info(self, body, kind, repo_id, revision):
        found = self.files(kind, repo_id, revision)
        if found:
            text = body.decode()
            paths = json.loads(text)['paths'] if text.startswith('{') else \
                [unquote(part.partition('=')[2]) for part in text.split('&') if part.startswith('paths=')]
            self.json([self.entry(path, found[2][path]) for path in paths if path in found[2]])

    def resolve(self, body, kind, repo_id, revision, path):
        found = self.files('datasets' if kind else 'models', repo_id, revision)
        if not found:
            return
        _, oid, files = found
        if path not in files:
            self.send(404, b'', X_Error_Code='EntryNotFound', X_Error_Message='EntryNotFound', X_Repo_Commit=oid)
            return
        content, headers = files[path], dict(X_Repo_Commit=oid, Accept_Ranges='bytes')
        headers['ETag'] = f'"{blob_id(path, content)}"'
        if is_lfs(path):
            headers.update(X_Linked_ETag=headers['ETag'], X_Linked_Size=str(len(content)))
        part = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if part is None:
            self.send(200, content, **headers)
            return
        first, last = int(part[1]), int(part[2] or len(content) - 1)
        self.send(206, content[first:last + 1], Content_Range=f'bytes {first}-{last}/{len(content)}', **headers)

"""A server on this machine that speaks the protocol of the Hugging Face Hub, as far as it is used.

Repositories are lists of commits, each a dictionary of files. Large files go through LFS: the batch
call, a PUT, and the line `lfsFile` of the commit.
"""

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.commands import environment

TOKEN = "hf_of_user"
LFS_FROM = 512  # bytes; larger files, and those with a zero byte, are LFS


def is_lfs(data: bytes) -> bool:
    """Whether a file is kept as LFS."""
    return len(data) > LFS_FROM or b"\0" in data


@dataclass
class Repo:
    """A repository: its branches and tags, and the files of each commit."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
        """Add files to a branch and return the commit."""
        before = self.commits.get(self.refs.get(ref, ""), {})
        oid = hashlib.sha1(f"{len(self.commits)} {ref} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = before | files, oid
        self.messages.append(message)
        return oid


class Hub(ThreadingHTTPServer):
    """The server. `asked` has each request; `broken` is a status that answers all of them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken = 0

    @property
    def url(self) -> str:
        """Its address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> str:
        """Add a commit to a repository, made if it is new; return the commit."""
        return self.repos.setdefault(name, Repo(**options)).commit(files)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self._answer()

    def do_GET(self) -> None:
        """Answer a question."""
        self._answer()

    def do_POST(self) -> None:
        """Change something."""
        self._answer()

    def do_PUT(self) -> None:
        """Take a large file."""
        self._answer()

    # ------------------------------------------------------------

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        if self.server.broken:
            self._send({}, self.server.broken)
        elif path.startswith("lfs/"):
            self._store(path.removeprefix("lfs/"))
        elif self.headers.get("Authorization", f"Bearer {TOKEN}") not in (
            f"Bearer {TOKEN}",
            "Bearer hf_of_reader",
        ):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "api/repos/create":
            self._create()
        elif path == "api/validate-yaml":
            self._validate()
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch()
        else:
            self._of_repo(path)

    @property
    def _reads_private(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _of_repo(self, path: str) -> None:
        api = path.startswith("api/models/")
        user, name, *rest = [*path.removeprefix("api/models/").split("/"), "", ""]
        repo = self.server.repos.get(f"{user}/{name}")
        if repo is None or (repo.private and not self._reads_private):
            known = "Authorization" in self.headers
            # The Hub tells a stranger less.
            self._refuse(404 if known else 401, "RepoNotFound", "Repository not found")
            return
        kind, rest = (rest[0] or "info", [part for part in rest[1:] if part])
        if kind == "info":
            kind, rest = "revision", ["main"]
        if kind in ("preupload", "commit", "branch"):
            if not self._reads_private:
                self._refuse(403, "", "You don't have the required permissions")
            elif kind == "branch":
                self._branch(repo, "/".join(rest))
            elif kind == "commit":
                self._commit(f"{user}/{name}", repo, "/".join(rest))
            else:
                self._preupload()
            return
        ref = "/".join(rest[:3]) if rest[:1] == ["refs"] else (rest or ["main"])[0]
        # A name with a slash comes as %2F, which is one part for the Hub.
        ref = next((r for r in repo.refs if "/".join(rest).startswith(f"{r}/") and "/" in r), ref)
        ref = "/".join(rest) if "/".join(rest) in repo.refs else ref
        oid = ref if ref in repo.commits else repo.refs.get(ref)
        if oid is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {ref}")
            return
        files = repo.commits[oid]
        if repo.gated and kind == "resolve" and not self._reads_private:
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            about = {"id": f"{user}/{name}", "sha": oid, "private": repo.private}
            self._send(about | {"siblings": siblings})
        elif kind == "tree" and api:
            self._send([self._entry(name, data) for name, data in sorted(files.items())])
        elif kind == "resolve" and not api:
            self._file("/".join(rest).removeprefix(f"{ref}/"), files, oid)
        else:
            self._refuse(404, "", "no such page")

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(data).hexdigest()
        entry = {"type": "file", "path": name, "size": len(data), "oid": oid}
        if is_lfs(data):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def _file(self, name: str, files: dict[str, bytes], oid: str) -> None:
        if name not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        data = files[name]
        hashed = hashlib.sha256 if is_lfs(data) else hashlib.sha1
        self._send(data, headers={"ETag": f'"{hashed(data).hexdigest()}"', "X-Repo-Commit": oid})

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if "Authorization" not in self.headers:
            self._refuse(401, "", "Invalid username or password.")
        elif not name.startswith("user/") or not self._reads_private:
            self._refuse(403, "", "You don't have the rights to create a model under this name")
        elif name in self.server.repos:
            answer = {"error": "You already created this model repo"}
            self._send(answer | {"url": f"{self.server.url}/{name}"}, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.server.repos[name].private = private
            self._send({"url": f"{self.server.url}/{name}", "name": name})

    def _validate(self) -> None:
        """Answer whether a card begins with front matter that has a licence."""
        head = json.loads(self.body)["content"].split("---\n")
        if len(head) > 2 and not head[0] and "license:" not in head[1]:
            self._send({"errors": [{"message": '"license" is required'}], "warnings": []}, 400)
        else:
            self._send({"errors": [], "warnings": []})

    def _branch(self, repo: Repo, name: str) -> None:
        if name in repo.refs:
            self._refuse(409, "", "Reference already exists")
        else:
            repo.refs[name] = repo.refs["main"]
            self._send({})

    def _preupload(self) -> None:
        answers = []
        for file in json.loads(self.body)["files"]:
            sample = base64.b64decode(file["sample"])
            large = file["size"] > LFS_FROM or is_lfs(sample)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self._send({"files": answers})

    def _batch(self) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{asked['oid']}"}
            objects.append({**asked, "actions": {"upload": upload}})
        self._send({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.stored[oid] = self.body
        self._send({})

    def _commit(self, name: str, repo: Repo, ref: str) -> None:
        files, message = {}, ""
        for line in self.body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        if ref not in repo.refs:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {ref}")
            return
        oid = repo.commit(files, ref, message)
        url = f"{self.server.url}/{name}/commit/{oid}"
        self._send({"success": True, "commitOid": oid, "commitUrl": url})

    # ------------------------------------------------------------

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send({"error": message}, status, headers)

    def _send(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = "application/octet-stream" if isinstance(answer, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def hub() -> Iterator[Hub]:
    """Run a server without repositories."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.daemon = True
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


SCRIPT = """
import json, sys
from glide_jax.errors import GlideError
from glide_jax.weights.hub import download
for name in sys.argv[1:]:
    try:
        found = download(name)
        print(json.dumps([found.path, found.name]))
    except GlideError as error:
        print(json.dumps([error.exit_code, str(error)]))
"""


@dataclass
class Client:
    """A user of a server: runs commands as processes, with a cache and a token of its own."""

    server: Hub
    home: Path

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        """Run `python <arguments>` in the folder of the user."""
        settings = {
            "HF_ENDPOINT": self.server.url,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        words = [sys.executable, *map(str, arguments)]
        env = {k: v for k, v in environment().items() if k != "HF_TOKEN"} | settings | variables
        return subprocess.run(
            words, cwd=self.home, env=env, capture_output=True, text=True, timeout=600, check=False
        )

    def glide(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        """Run `glide-jax <arguments>`."""
        return self.run("-m", "glide_jax", *arguments, **variables)

    def download(self, *names: str, **variables: str) -> list[list[Any]]:
        """Return, for each name, path and full name, or exit code and message."""
        result = self.run("-c", SCRIPT, *names, **variables)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        return [json.loads(line) for line in result.stdout.splitlines()]

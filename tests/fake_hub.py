"""A small stand-in for the Hugging Face Hub: the few routes that huggingface_hub uses to read and to write models."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Repositories in memory.

    repos: name -> its commits, oldest first, each path -> content.
    private: repositories that need the token.
    requests: what was asked, "METHOD /path".
    """

    token = "hf_secret"

    def __init__(self, address: str = "") -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.branches: dict[str, dict[str, int]] = {}  # name -> revision -> number of the commit
        self.requests: list[str] = []
        self.address = address

    def sha(self, repo: str, number: int) -> str:
        return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()

    def commit(self, repo: str, revision: str) -> int | None:
        """Number of the commit that a revision names."""
        count = len(self.repos[repo])
        names = {self.sha(repo, n): n for n in range(count)} | self.branches.get(repo, {}) | {"main": count - 1}
        return names.get(revision)


def handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, code: str, status: int = 404) -> None:
            self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

        def serve(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {path}")
            known = self.headers.get("Authorization") == f"Bearer {hub.token}"
            if path == "/api/repos/create":
                return self.create(json.loads(body), known)
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repo, rest = "/".join(parts[:2]), parts[2:]
            if repo not in hub.repos or (repo in hub.private and not known):
                return self.refuse("RepoNotFound", 404 if known else 401)
            if rest[:1] in (["preupload"], ["commit"]):
                return self.write(repo, rest, body, known)
            revision = rest[1] if len(rest) > 1 else "main"
            number = hub.commit(repo, revision)
            if number is None:
                return self.refuse("RevisionNotFound")
            files, sha = hub.repos[repo][number], hub.sha(repo, number)
            if rest[:1] == ["resolve"]:
                name = "/".join(rest[2:])
                if name not in files:
                    return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
                etag = hashlib.sha1(files[name]).hexdigest()
                return self.answer(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)
            if rest[:1] == ["tree"]:
                row = {"type": "file"}
                return self.answer(
                    200,
                    [{**row, "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()} for k, v in files.items()],
                )
            self.answer(200, {"id": repo, "sha": sha, "private": False, "siblings": [{"rfilename": k} for k in files]})

        def create(self, given: dict, known: bool) -> None:
            if not known:
                return self.refuse("Unauthorized", 401)
            repo = f"{given.get('organization') or 'user'}/{given['name']}"
            status = 409 if repo in hub.repos else 200
            hub.repos.setdefault(repo, [{}])
            hub.private |= {repo} if given.get("private") or given.get("visibility") == "private" else set()
            self.answer(status, {"url": f"{hub.address}/{repo}", "name": repo, "id": repo})

        def write(self, repo: str, rest: list[str], body: bytes, known: bool) -> None:
            if not known:
                return self.refuse("Forbidden", 403)
            if rest[0] == "preupload":
                files = json.loads(body)["files"]
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                return self.answer(200, {"files": [{"path": f["path"], **mode} for f in files]})
            lines = [json.loads(line) for line in body.splitlines()]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            hub.repos[repo].append({**hub.repos[repo][-1], **added})
            sha = hub.sha(repo, len(hub.repos[repo]) - 1)
            self.answer(200, {"commitUrl": f"{hub.address}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

        do_GET = do_HEAD = do_POST = serve

    return Handler


@contextlib.contextmanager
def running() -> Iterator[FakeHub]:
    """A hub at a loopback port."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

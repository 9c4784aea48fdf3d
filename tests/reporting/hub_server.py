"""A small server that speaks as much of the Hub's protocol as uploads and downloads of models need."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name to files by path; large files by their SHA-256, as Git LFS keeps them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[dict] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = b""
            while size := int(self.rfile.readline(), 16):
                chunks += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return chunks
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, value=None, status: int = 200, headers: dict[str, str] | None = None, raw: bytes | None = None):
        content = raw if raw is not None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def missing(self, code: str = "EntryNotFound"):
        self.reply({"error": code}, 404, {"X-Error-Code": code})

    def do_POST(self):
        path, content = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if name in self.server.repositories else 200
            self.server.repositories.setdefault(name, {})
            return self.reply({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name}, status)
        if path.startswith("/api/models/") and "/branch/" in path:
            return self.reply({"error": "exists"}, 409)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.server.endpoint}/lfs/{entry['oid']}"}}}
                for entry in json.loads(content)["objects"]
            ]
            return self.reply({"transfer": "basic", "objects": objects})
        if "/preupload/" in path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            return self.reply({"files": files, "commitOid": COMMIT})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            paths = []
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.repositories[name][entry["value"]["path"]] = base64.b64decode(
                        entry["value"]["content"]
                    )
                elif entry["key"] == "lfsFile":
                    self.server.repositories[name][entry["value"]["path"]] = self.server.large[entry["value"]["oid"]]
                if entry["key"] != "header":
                    paths.append(entry["value"]["path"])
            self.server.commits.append({"repository": name, "paths": paths})
            url = f"{self.server.endpoint}/{name}"
            return self.reply({"success": True, "commitOid": COMMIT, "commitUrl": f"{url}/commit/{COMMIT}"})
        return self.missing()

    def do_PUT(self):
        content = self.body()
        digest = self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != digest:
            return self.reply({"error": "wrong digest"}, 400)
        self.server.large[digest] = content
        return self.reply({})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.reply({"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})
        if path.startswith("/api/models/"):
            name, _, rest = path.removeprefix("/api/models/").partition("/tree/" if "/tree/" in path else "/revision/")
            files = self.server.repositories.get(name)
            if files is None:
                return self.missing("RepoNotFound")
            entries = [
                {"type": "file", "path": file, "rfilename": file, "size": len(content), "oid": "0" * 40}
                for file, content in files.items()
            ]
            if "/tree/" in path:
                return self.reply(entries)
            return self.reply(
                {"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": entries, "tags": []}
            )
        name, _, rest = path.lstrip("/").partition("/resolve/")
        if name not in self.server.repositories:
            return self.missing("RepoNotFound")
        content = self.server.repositories[name].get(rest.partition("/")[2])
        if content is None:
            return self.missing()
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Content-Type": "application/octet-stream"}
        return self.reply(headers=headers, raw=content)

    do_HEAD = do_GET

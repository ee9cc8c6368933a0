"""What the hub answers."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from .faults import Fault, Request
from .repositories import ConflictError, Entry, Repository

if TYPE_CHECKING:
    from .server import LocalHub


class RefusedError(Exception):
    """An answer that is an error, with the headers by which the client knows its kind."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({} if code is None else {"X-Error-Code": code})


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def setup(self) -> None:
        self.hub = self.server.hub  # type: ignore[attr-defined]
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        begun = time.perf_counter()
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        request, fault = self.hub.begin(self.command, path)
        if fault is not None and fault.action == "slow":
            time.sleep(fault.delay)
        if fault is not None and fault.action == "reset":
            self._reset()
            return
        if fault is not None and fault.action == "status":
            message = {"X-Error-Message": f"a fault of {fault.status}"}
            self._answer(
                request, fault.status, {**message, **fault.headers}, fault.body or b'{"error": "a fault"}', None
            )
            return
        try:
            status, headers, content = self._do(request.kind, path, body)
        except RefusedError as error:
            status, headers = error.status, error.headers
            content = json.dumps({"error": str(error)}).encode()
        if fault is not None and fault.action == "lost-answer":
            self._reset()
            return
        self._answer(request, status, headers, content, fault)
        request.seconds = time.perf_counter() - begun

    def _answer(
        self, request: Request, status: int, headers: dict[str, str], content: bytes, fault: Fault | None
    ) -> None:
        request.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.action == "corrupt" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        if fault is not None and fault.action in ("cut", "reset-body"):
            content = content[: fault.after_bytes]
        request.sent_bytes = len(content)
        self.wfile.write(content)
        self.wfile.flush()
        if fault is not None and fault.action == "reset-body":
            time.sleep(0.05)
            self._reset()
        elif fault is not None and fault.action == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _reset(self) -> None:
        """Close so that the other side sees a reset, not an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _do(self, kind: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        if kind.startswith("lfs-") and path.startswith("/lfs/"):
            return self._lfs_object(kind, path.rsplit("/", 1)[1], body)
        user = self._user()
        if kind == "whoami":
            if user is None:
                raise RefusedError(401, "Invalid username or password.")
            return _json({"type": "user", "name": user[0], "orgs": [], "auth": {"accessToken": {"role": user[1]}}})
        if kind == "validate-yaml":
            return _json({"errors": [], "warnings": []})
        if kind == "create":
            return self._create(json.loads(body), user)
        if kind in ("get", "head"):
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            assert found is not None
            return self._file(self._repository(found[1], user), found[2], found[3])
        if kind in ("lfs-batch", "lfs-verify"):
            return self._lfs(kind, path[1:].split(".git/")[0], json.loads(body), user)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit)/(.+))?", path)
        if found is None:
            raise RefusedError(404, f"this hub knows no {kind}")
        name, revision = found[1], found[3] or "main"
        repository = self._repository(name, user, writes=found[2] in ("preupload", "commit"))
        if found[2] == "preupload":
            return self._preupload(repository, revision, json.loads(body))
        if found[2] == "commit":
            return self._commit(name, repository, revision, body)
        return self._info(name, repository, revision)

    def _user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        user = self.hub.user(token)
        if user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def _repository(self, name: str, user: tuple[str, str] | None, *, writes: bool = False) -> Repository:
        found, owner = self.hub.get(name), name.split("/")[0]
        if found is None or (found.private and (user is None or user[0] != owner)):
            if user is None:
                raise RefusedError(401, "Invalid username or password.")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        if writes and (user is None or user != (owner, "write")):
            raise RefusedError(403, "you don't have the rights to write here")
        return found

    def _create(self, values: dict[str, Any], user: tuple[str, str] | None) -> tuple[int, dict[str, str], bytes]:
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        name = f"{values.get('organization') or user[0]}/{values['name']}"
        if user != (name.split("/")[0], "write"):
            raise RefusedError(
                403, f"you don't have the rights to create a model under the namespace {name.split('/')[0]}"
            )
        url = f"{self.hub.endpoint}/{name}"
        with self.hub.lock:
            if self.hub.get(name) is not None:
                return 409, {}, json.dumps({"error": "You already created this model repo", "url": url}).encode()
            private = values.get("private") or values.get("visibility") == "private"
            self.hub.create(name, private=bool(private))
        return _json({"url": url, "name": name, "id": name})

    def _info(self, name: str, repository: Repository, revision: str) -> tuple[int, dict[str, str], bytes]:
        commit = _resolved(repository, revision)
        siblings = [_sibling(entry) for entry in repository.entries(commit).values()]
        about = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": repository.private, "tags": []}
        return _json(
            {**about, "gated": "manual" if repository.gated else False, "disabled": False, "siblings": siblings}
        )

    def _preupload(
        self, repository: Repository, revision: str, values: dict[str, Any]
    ) -> tuple[int, dict[str, str], bytes]:
        entries = repository.entries(_resolved(repository, revision))
        files = []
        for file in values["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > 10 * 2**20
            there = entries.get(file["path"])
            known = None if there is None else there.lfs or there.blob
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        return _json({"files": files})

    def _commit(
        self, name: str, repository: Repository, revision: str, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        _resolved(repository, revision)
        files: dict[str, bytes | None] = {}
        lfs: dict[str, tuple[str, int]] = {}
        header: dict[str, Any] = {}
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                header = value
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                if not (self.hub.objects / value["oid"]).is_file():
                    raise RefusedError(400, f"LFS object {value['oid']} is not here")
                lfs[value["path"]] = (value["oid"], value["size"])
            elif entry["key"] == "deletedFile":
                files[value["path"]] = None
        try:
            with self.hub.lock:
                made = repository.commit(revision, files, header["summary"], lfs=lfs, parent=header.get("parentCommit"))
        except ConflictError as error:
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.") from error
        return _json(
            {
                "success": True,
                "commitOid": made,
                "commitUrl": f"{self.hub.endpoint}/{name}/commit/{made}",
                "hookOutput": "",
            }
        )

    def _file(self, repository: Repository, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        if repository.gated:
            raise RefusedError(403, "Access to this model is restricted.", "GatedRepo")
        commit = _resolved(repository, revision)
        entry = repository.entries(commit).get(path)
        if entry is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if entry.lfs is None:
            return 200, {**headers, "ETag": f'"{entry.blob}"'}, repository.read(entry)
        target = {"Location": f"{self.hub.lfs_endpoint}/lfs/{entry.lfs}", "X-Linked-Size": str(entry.size)}
        return 302, {**headers, **target, "X-Linked-Etag": f'"{entry.lfs}"', "ETag": f'"{entry.lfs}"'}, b""

    def _lfs(
        self, kind: str, name: str, values: dict[str, Any], user: tuple[str, str] | None
    ) -> tuple[int, dict[str, str], bytes]:
        self._repository(name, user, writes=True)
        if kind == "lfs-verify":
            if not (self.hub.objects / values["oid"]).is_file():
                raise RefusedError(404, "no such object")
            return _json({})
        objects = []
        for wanted in values["objects"]:
            found: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if not (self.hub.objects / wanted["oid"]).is_file():
                upload = {"href": f"{self.hub.lfs_endpoint}/lfs/{wanted['oid']}", "header": {}}
                verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify", "header": {}}
                found["actions"] = {"upload": upload, "verify": verify}
            objects.append(found)
        return _json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _lfs_object(self, kind: str, oid: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        file = self.hub.objects / oid
        if kind == "lfs-put":
            repository = next(iter(self.hub._repositories.values()))
            if repository.store(body) != oid:
                raise RefusedError(400, "the content is not that of its oid")
            return 200, {}, b""
        if not file.is_file():
            raise RefusedError(404, "no such object")
        content = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found is None:
            return 200, {"ETag": f'"{oid}"'}, content
        start, end = int(found[1]), int(found[2] or len(content) - 1)
        return 206, {"Content-Range": f"bytes {start}-{end}/{len(content)}"}, content[start : end + 1]


def _resolved(repository: Repository, revision: str) -> str:
    commit = repository.resolve(revision)
    if commit is None:
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    return commit


def _sibling(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": entry.path, "size": entry.size, "blobId": entry.blob}
    if entry.lfs is not None:
        found["lfs"] = {"sha256": entry.lfs, "size": entry.size, "pointerSize": entry.pointer_size}
    return found


def _json(value: Any, kind: str = "application/json") -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": kind}, json.dumps(value).encode()

"""The hub: its users and repositories, and the two servers, of which the second hands out LFS objects."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Self

from .faults import Fault, Request, kind_of
from .handler import Handler
from .repositories import Repository


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LocalHub) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the game; anything else is an error of the hub, for the test to find."""
        import sys

        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError | BrokenPipeError | ValueError | OSError):
            self.hub.errors.append(repr(error))


class LocalHub:
    """A hub that serves inside its context."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.errors: list[str] = []
        """Exceptions of the hub itself."""
        self.on_request: Callable[[Request], object] | None = None
        """Called with each request when it has arrived whole, before anything is done."""
        self.lock = threading.RLock()
        self._users: dict[str, tuple[str, str]] = {}
        self._repositories: dict[str, Repository] = {}
        self._faults: list[Fault] = []

    def __enter__(self) -> Self:
        self._scratch = tempfile.TemporaryDirectory(prefix="local-hub-", ignore_cleanup_errors=True)
        self._folder = Path(self._scratch.name)
        self.objects = self._folder / "lfs"
        self.objects.mkdir()
        self._main, self._lfs = _Server(self), _Server(self)
        self.endpoint = self._main.address
        # Another host, not only another port: a client before 2.0 takes a redirect to the same host for one of the hub's own.
        self.lfs_endpoint = self._lfs.address.replace("127.0.0.1", "localhost")
        for server in (self._main, self._lfs):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in (self._main, self._lfs):
            server.shutdown()
            server.server_close()
        self._scratch.cleanup()
        assert not self.errors, self.errors

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The environment of a client of this hub that keeps its files in `home`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        login = {} if token is None else {"HF_TOKEN": token}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **login,
        }

    def add_user(self, name: str, token: str, role: str = "write") -> None:
        """Let `token` stand for `name`, who may push with the role `write`."""
        self._users[token] = (name, role)

    def user(self, token: str) -> tuple[str, str] | None:
        """Name and role of a token's user."""
        return self._users.get(token)

    def create(self, repository: str, *, private: bool = False, gated: bool = False) -> Repository:
        """Make a repository."""
        with self.lock:
            folder = self._folder / f"{repository.replace('/', '--')}.git"
            made = Repository(folder, self.objects, private=private, gated=gated)
            self._repositories[repository] = made
            return made

    def get(self, repository: str) -> Repository | None:
        """A repository, None where there is none."""
        return self._repositories.get(repository)

    def commit(
        self,
        repository: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        message: str = "a commit",
        private: bool = False,
        gated: bool = False,
        symlinks: Mapping[str, str] | None = None,
    ) -> str:
        """Commit `files`, safetensors to LFS, to a repository that is made if need be; the commit."""
        with self.lock:
            found = self.get(repository) or self.create(repository, private=private, gated=gated)
            large = {path: content for path, content in files.items() if path.endswith(".safetensors")}
            lfs = {path: (found.store(content), len(content)) for path, content in large.items()}
            small = {path: content for path, content in files.items() if path not in large}
            return found.commit(revision, small, message, lfs=lfs, links=symlinks)

    def tag(self, repository: str, name: str, commit: str) -> None:
        """Tag a commit."""
        self._repositories[repository].tag(name, commit)

    def files(self, repository: str, revision: str) -> dict[str, bytes]:
        """The content of every file at a revision."""
        found = self._repositories[repository]
        commit = found.resolve(revision)
        assert commit is not None, f"{repository} has no {revision}"
        return {path: found.read(entry) for path, entry in found.entries(commit).items()}

    def commits(self, repository: str, revision: str) -> list[str]:
        """The commits of a revision, newest first."""
        return self._repositories[repository].history(revision)

    def exists(self, repository: str) -> bool:
        """Whether there is such a repository."""
        return repository in self._repositories

    def is_private(self, repository: str) -> bool:
        """Whether only its owner may see it."""
        return self._repositories[repository].private

    def reset_requests(self) -> None:
        """Forget the requests so far."""
        with self.lock:
            self.requests.clear()

    def fault(self, fault: Fault) -> None:
        """Do `fault` to requests to come."""
        self._faults.append(fault)

    def clear_faults(self) -> None:
        """Do no more of them."""
        self._faults.clear()

    def begin(self, method: str, path: str) -> tuple[Request, Fault | None]:
        """Record a request that has arrived, and say what is to be done to it."""
        with self.lock:
            request = Request(len(self.requests) + 1, method, path, kind_of(method, path))
            self.requests.append(request)
            fault = next((fault for fault in self._faults if fault.meets(request)), None)
            if fault is not None and fault.times is not None:
                fault.times -= 1
        if self.on_request is not None:
            self.on_request(request)
        return request, fault

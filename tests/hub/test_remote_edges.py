"""Push and pull at the edges: caches that are copies or damaged, names of revisions, cards of others, tokens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hub_worker import Worker, digest
from local_hub import LocalHub

from phantomgrad_hub import MDEQ

pytestmark = pytest.mark.skipif(shutil.which("git") is None or os.name != "posix", reason="needs git and fork")


def test_a_cache_of_plain_copies_is_verified_too(
    ann: Worker, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    ann("push", folder=str(folder), repository=repository)
    ann("load", checkpoint=repository, cache_dir=str(tmp_path / "cache"))
    shutil.copytree(tmp_path / "cache", tmp_path / "plain")  # follows links
    options = {"checkpoint": repository, "cache_dir": str(tmp_path / "plain"), "local_files_only": True}
    assert ann("load", **options)["digest"] == digest(model)
    [weights] = (tmp_path / "plain").glob("*/snapshots/*/model.safetensors")
    assert not weights.is_symlink()
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "is not in the cache" in ann("load", **options)["message"]


def test_what_another_program_fetched_serves_offline(
    ann: Worker, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    ann("push", folder=str(folder), repository=repository)
    ann("load", checkpoint=repository, cache_dir=str(tmp_path / "cache"))
    [notes] = (tmp_path / "cache").glob("*/phantomgrad")
    commit = (notes / "main.revision").read_text()
    shutil.rmtree(notes)
    (notes.parent / "refs").mkdir(exist_ok=True)
    (notes.parent / "refs" / "main").write_text(commit)
    found = ann("load", checkpoint=repository, cache_dir=str(tmp_path / "cache"), local_files_only=True)
    assert (found["digest"], found["source"]["commit"]) == (digest(model), commit)


def test_names_of_revisions_do_not_get_into_each_others_way(
    ann: Worker, server: LocalHub, folder: Path, repository: str, tmp_path: Path
) -> None:
    commit = ann("push", folder=str(folder), repository=repository)["commit"]
    where = {"checkpoint": repository, "cache_dir": str(tmp_path / "cache")}
    for revision in ("release/v1.0", "dev#1"):
        server.tag(repository, revision, commit)
        assert ann("load", revision=revision, **where)["source"]["commit"] == commit
        assert ann("load", revision=revision, local_files_only=True, **where)["source"]["commit"] == commit
    for revision in ("", "a b", "../x", "a..b", "-x", "x.lock", "a@{1}"):
        refused = ann("load", revision=revision, **where)
        assert "is no branch, tag or commit" in refused["message"], refused


def test_what_is_sent_is_what_was_loaded(
    ann: Worker, server: LocalHub, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    server.on_request = lambda request: (folder / "labels.json").write_text("[]")
    try:
        done = ann("push", folder=str(folder), repository=repository)
    finally:
        server.on_request = None
    assert "labels.json" in done["sent"]
    assert ann("load", checkpoint=repository, cache_dir=str(tmp_path / "cache"))["digest"] == digest(model)


def test_a_push_to_what_is_no_branch_makes_nothing(
    ann: Worker, server: LocalHub, folder: Path, repository: str
) -> None:
    told = ann("push", folder=str(folder), repository=repository, revision="nobranch")
    assert told["message"].startswith(f"{repository} is not there, so it has no branch nobranch")
    assert not server.exists(repository)
    commit = ann("push", folder=str(folder), repository=repository)["commit"]
    told = ann("push", folder=str(folder), repository=repository, revision=commit)
    assert told["message"].startswith(f"{commit} is a commit, and a push goes to a branch")
    told = ann("push", folder=str(folder), repository=repository, revision="nobranch")
    assert told["message"].startswith(f"{repository} has no revision nobranch")
    assert "is no branch" in ann("push", folder=str(folder), repository=repository, revision="../x")["message"]


def test_a_stub_of_a_card_is_replaced(ann: Worker, server: LocalHub, folder: Path, repository: str) -> None:
    server.commit(repository, {"README.md": b"---\nlicense: mit\n---\n"})
    done = ann("push", folder=str(folder), repository=repository)
    assert "README.md" in done["sent"]
    assert not done["kept_card"]


def test_the_token_that_was_used_is_the_one_spoken_of(ann: Worker, folder: Path, repository: str) -> None:
    ann("push", folder=str(folder), repository=repository, private=True)
    assert "if it is private, log in (" in ann("load", checkpoint=repository, token=False)["message"]
    assert "does not accept your token (401)" in ann("load", checkpoint=repository, token="hf_bad")["message"]
    assert "token is an empty text" in ann("load", checkpoint=repository, token="")["message"]


def test_who_is_offline_is_told_soon(
    ann: Worker, server: LocalHub, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    ann("push", folder=str(folder), repository=repository)
    cache = str(tmp_path / "cache")
    commit = ann("load", checkpoint=repository, cache_dir=cache)["source"]["commit"]
    home = tmp_path / "home"
    home.mkdir()
    # Nobody listens there.
    offline = Worker({**server.environment(home), "HF_ENDPOINT": "http://127.0.0.1:9"}, home)
    try:
        told = offline("load", checkpoint=repository, cache_dir=str(tmp_path / "other"))
        assert told["message"].startswith(f"the Hugging Face Hub cannot be reached for {repository}: ")
        assert told["waited"] < 3
        found = offline("load", checkpoint=repository, cache_dir=cache)
        assert (found["digest"], found["source"]["commit"]) == (digest(model), commit)
        assert "the copy in the cache" in found["warnings"][0]
    finally:
        offline.close()

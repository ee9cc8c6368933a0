"""Push and pull with the real client against a local hub: what is sent, what is kept, what is refused, in which words."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_worker import Worker, digest
from local_hub import LocalHub
from small import pooled_config

from phantomgrad import NotConvergedWarning
from phantomgrad_hub import MDEQ, HubError
from phantomgrad_hub.facts import Facts
from phantomgrad_hub.remote.card import is_rendered
from phantomgrad_hub.remote.explain import explain, explaining

pytestmark = pytest.mark.skipif(shutil.which("git") is None or os.name != "posix", reason="needs git and fork")

WHOLE = {"config.json", "labels.json", "preprocessor.json", "model.safetensors", "README.md", "card.json"}


def kinds(server: LocalHub) -> list[str]:
    return [request.kind for request in server.requests]


def test_push_then_pull_gives_the_same_model(
    ann: Worker, server: LocalHub, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    done = ann("push", folder=str(folder), repository=repository)
    assert set(done["sent"]) == WHOLE, done
    assert done["commit"] == server.commits(repository, "main")[0]
    assert set(server.files(repository, "main")) >= WHOLE
    assert is_rendered(server.files(repository, "main")["README.md"].decode())
    assert f'MDEQ.from_pretrained("{repository}")' in server.files(repository, "main")["README.md"].decode()

    server.reset_requests()
    loaded = ann("load", checkpoint=repository, cache_dir=str(tmp_path / "cache"))
    assert loaded["digest"] == digest(model)
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        expected = model.eval()(images).flatten().tolist()
    assert loaded["logits"] == pytest.approx(expected, abs=1e-6)
    assert loaded["source"] == {"repository": repository, "commit": done["commit"]}
    # One request names the commit and every file of it; each file is then asked for once.
    assert kinds(server).count("revision") + kinds(server).count("info") == 1
    assert "tree" not in kinds(server)
    assert all(done["commit"] in request.path for request in server.requests if request.kind in ("head", "get"))

    server.reset_requests()
    again = ann("load", checkpoint=repository, cache_dir=str(tmp_path / "cache"))
    assert again["digest"] == loaded["digest"]
    assert len(server.requests) == 1


def test_a_push_of_what_is_there_makes_no_commit(ann: Worker, server: LocalHub, folder: Path, repository: str) -> None:
    first = ann("push", folder=str(folder), repository=repository)
    server.reset_requests()
    second = ann("push", folder=str(folder), repository=repository)
    assert (second["sent"], second["commit"]) == ([], first["commit"])
    assert "commit" not in kinds(server)
    assert "preupload" not in kinds(server)


def test_only_what_differs_is_sent_in_one_commit(ann: Worker, server: LocalHub, folder: Path, repository: str) -> None:
    first = ann("push", folder=str(folder), repository=repository)
    loaded = MDEQ.from_pretrained(folder)
    with torch.no_grad():
        loaded.head.classifier.weight.mul_(2)
    loaded.save_pretrained(folder)
    second = ann("push", folder=str(folder), repository=repository, message="Twice as sure")
    assert second["sent"] == ["model.safetensors"]
    assert len(server.commits(repository, "main")) == len(server.commits(repository, first["commit"])) + 1


def test_an_edited_card_stays_unless_it_is_to_be_replaced(
    ann: Worker, server: LocalHub, folder: Path, model: MDEQ, repository: str
) -> None:
    ann("push", folder=str(folder), repository=repository)
    edited = server.files(repository, "main")["README.md"] + b"\nMy own words.\n"
    server.commit(repository, {"README.md": edited})
    kept = ann("push", folder=str(folder), repository=repository)
    assert (kept["sent"], kept["kept_card"]) == ([], True)
    assert server.files(repository, "main")["README.md"] == edited
    told = ann("command", arguments=["push", str(folder), repository])
    assert told["status"] == 0
    assert (
        "README.md on the Hub differs and somebody wrote or edited it, so it stays; --overwrite-card replaces it."
        in told["out"]
    )
    done = ann("push", folder=str(folder), repository=repository, overwrite_card=True)
    assert (done["sent"], done["kept_card"]) == (["README.md"], False)
    # A card that nobody edited follows the facts.
    changed = MDEQ.from_pretrained(folder)
    changed.facts = Facts(title="Only ants")
    changed.save_pretrained(folder)
    done = ann("push", folder=str(folder), repository=repository)
    assert set(done["sent"]) == {"README.md", "card.json"}
    assert b"# Only ants" in server.files(repository, "main")["README.md"]


def test_private_is_private(
    workers: dict[str | None, Worker], ann: Worker, folder: Path, server: LocalHub, repository: str
) -> None:
    ann("push", folder=str(folder), repository=repository, private=True)
    assert server.is_private(repository)
    assert "error" not in ann("load", checkpoint=repository)
    for stranger, cure in (
        ("bob", "that your account may read it"),
        (None, "log in (`hf auth login`, or set HF_TOKEN)"),
    ):
        refused = workers[stranger]("load", checkpoint=repository)
        assert "CheckpointNotFoundError" in refused["kinds"], refused
        assert refused["message"].startswith(f"{repository} is neither a folder here nor a repository")
        assert cure in refused["message"]
    refused = ann("push", folder=str(folder), repository=repository, private=False)
    assert f"{repository} is there already and is private" in refused["message"]


def test_python_pushes_too(
    ann: Worker, server: LocalHub, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    done = ann("push_model", checkpoint=str(folder), repository=repository, commit_message="From Python")
    assert set(done["sent"]) == WHOLE
    assert ann("load", checkpoint=repository, cache_dir=str(tmp_path / "cache"))["digest"] == digest(model)


def test_the_embedded_checkpoint_is_pushed_by_the_command_line(
    ann: Worker, server: LocalHub, repository: str, tmp_path: Path
) -> None:
    dry = ann("command", arguments=["push", "embedded", repository, "--dry-run"])
    assert dry["status"] == 0, dry
    assert "model.safetensors" in dry["out"]
    assert "8,356,576 bytes" in dry["out"]
    assert not server.requests
    done = ann("command", arguments=["push", "embedded", repository, "--private"])
    assert done["status"] == 0, done
    assert done["out"].startswith(f"{server.endpoint}/{repository} at ")
    again = ann("command", arguments=["push", "embedded", repository])
    assert again["out"].endswith("everything was there, no commit made\n")
    out = tmp_path / "copy"
    pulled = ann("command", arguments=["pull", repository, "--out", str(out)])
    assert pulled["status"] == 0, pulled
    assert ann("load", checkpoint=str(out))["digest"] == ann("load", checkpoint="embedded")["digest"]
    commit = server.commits(repository, "main")[0]
    assert ann("load", checkpoint=str(out))["source"] == {"repository": repository, "commit": commit}
    assert f"at commit `{commit}`" in (out / "README.md").read_text()
    # A copy that was not changed makes no commit either.
    assert ann("push", folder=str(out), repository=repository)["sent"] == []
    refused = ann("command", arguments=["pull", repository, "--out", str(out)])
    assert (refused["status"], refused["err"]) == (
        2,
        f"phantomgrad pull: --out {out} is there already; give a folder that is not\n",
    )


def test_a_revision_is_resolved_once_and_pinned(
    ann: Worker, server: LocalHub, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    old = ann("push", folder=str(folder), repository=repository)["commit"]
    server.tag(repository, "v1", old)
    changed = MDEQ.from_pretrained(folder)
    with torch.no_grad():
        changed.head.classifier.weight.mul_(2)
    changed.save_pretrained(folder)
    new = ann("push", folder=str(folder), repository=repository)["commit"]
    cache = str(tmp_path / "cache")
    for revision, commit in (("v1", old), (old, old), (None, new), ("main", new)):
        found = ann("load", checkpoint=repository, revision=revision, cache_dir=cache)
        assert found["source"]["commit"] == commit
        assert found["digest"] == digest(model if commit == old else changed)
    assert ann("load", checkpoint=f"{repository}@v1", cache_dir=cache)["source"]["commit"] == old
    # A commit that is whole in the cache is taken without a request.
    server.reset_requests()
    assert ann("load", checkpoint=repository, revision=old, cache_dir=cache)["source"]["commit"] == old
    assert not server.requests
    refused = ann("load", checkpoint=repository, revision="v9", cache_dir=cache)
    assert refused["message"].startswith(f"{repository} has no revision v9 on the Hugging Face Hub")
    assert "CheckpointNotFoundError" in refused["kinds"]


def test_offline_the_cache_serves_whole_checkpoints_only(
    ann: Worker, server: LocalHub, folder: Path, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    commit = ann("push", folder=str(folder), repository=repository)["commit"]
    cache = tmp_path / "cache"
    refused = ann("load", checkpoint=repository, cache_dir=str(cache), local_files_only=True)
    assert refused["kinds"][0] == "HubError"
    assert refused["message"].startswith(f"{repository} is not in the cache")
    ann("load", checkpoint=repository, cache_dir=str(cache))
    server.reset_requests()
    found = ann("load", checkpoint=repository, cache_dir=str(cache), local_files_only=True)
    assert (found["digest"], found["source"]["commit"]) == (digest(model), commit)
    assert not server.requests
    [weights] = cache.glob("*/snapshots/*/model.safetensors")
    content = weights.read_bytes()
    # A file that was damaged on the disk is noticed offline, and fetched anew online.
    weights.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused = ann("load", checkpoint=repository, cache_dir=str(cache), local_files_only=True)
    assert refused["message"].startswith(f"{repository} is not in the cache")
    assert ann("load", checkpoint=repository, cache_dir=str(cache))["digest"] == digest(model)
    for name in ("labels.json", "card.json"):
        # Also one that a checkpoint may lack: this one has it.
        next(cache.glob(f"*/snapshots/*/{name}")).unlink()
        refused = ann("load", checkpoint=repository, cache_dir=str(cache), local_files_only=True)
        assert refused["message"].startswith(f"{repository} is not in the cache")
        assert ann("load", checkpoint=repository, revision=commit, cache_dir=str(cache))["digest"] == digest(model)
        assert next(cache.glob(f"*/snapshots/*/{name}")).is_file()


@pytest.mark.parametrize("user", ["eve", "wrong", None])
def test_a_push_without_the_right_is_one_line(
    user: str | None, workers: dict[str | None, Worker], ann: Worker, folder: Path, repository: str, server: LocalHub
) -> None:
    ann("push", folder=str(folder), repository=repository)
    told = workers[user]("command", arguments=["push", str(folder), "ann/" + repository.split("/")[1] + "-new"])
    assert told["status"] == 1
    assert told["err"].count("\n") == 1
    expected = {
        "eve": "your token may not write to",
        "wrong": "does not accept your token (401); log in (`hf auth login`, or set HF_TOKEN) anew",
        None: "nobody is logged in, so nothing can be pushed to",
    }
    assert expected[user] in told["err"]
    # And to a repository that is there, after a change.
    changed = MDEQ.from_pretrained(folder)
    changed.facts = Facts(title="Another")
    changed.save_pretrained(folder)
    told = workers[user]("command", arguments=["push", str(folder), repository])
    assert (told["status"], told["err"].count("\n")) == (1, 1)
    assert expected[user] in told["err"]


def foreign(server: LocalHub, name: str, files: dict[str, bytes], **options: Any) -> str:
    server.commit(f"bob/{name}", files, **options)
    return f"bob/{name}"


def test_what_is_no_checkpoint_is_said_before_it_is_fetched(
    ann: Worker, server: LocalHub, folder: Path, repository: str
) -> None:
    small = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "model.safetensors"}
    weights = (folder / "model.safetensors").read_bytes()
    bert = foreign(server, "bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": weights})
    pickled = foreign(server, "pickled", {**small, "pytorch_model.bin": b"\x80\x04."})
    newer = foreign(
        server,
        "newer",
        {**small, "config.json": b'{"format_version": 99, "library_version": "9.0"}', "model.safetensors": weights},
    )
    large = foreign(server, "large", {**small, "model.safetensors": weights + bytes(30_000_000)})
    gated = foreign(server, "gated", {**small, "model.safetensors": weights}, gated=True)
    table = {
        bert: "is no checkpoint of phantomgrad: it has no labels.json, preprocessor.json; its config.json is that of a transformers model",
        pickled: "it has no model.safetensors; pytorch_model.bin is a pickle, which is never loaded: download it and run `phantomgrad convert`",
        newer: "format_version of the model config is 99, this release reads up to 2; update phantomgrad: pip install -U phantomgrad",
        large: "more than the",
        gated: f"bob/gated is gated: ask for access at {server.endpoint}/bob/gated",
        "bob/nothing": "bob/nothing is neither a folder here nor a repository on the Hugging Face Hub that you may read; check the name",
        "bob/..": "there is no checkpoint folder bob/..",
        "bob/bert@": "there is no checkpoint folder bob/bert@",
        "bob/bert@../../x": "'../../x' is no branch, tag or commit",
        "bob/a--b": "there is no checkpoint folder bob/a--b; a repository of the Hugging Face Hub is given as a str, user/name",
        "bob/x.git": "there is no checkpoint folder bob/x.git",
        "": "not by an empty text",
    }
    for name, message in table.items():
        server.reset_requests()
        told = ann("command", arguments=["predict", str(folder / "README.md"), "--checkpoint", name])
        told = ann("load", checkpoint=name)
        assert message in told["message"], told
        assert "\n" not in told["message"]
        assert not any("safetensors" in request.path or ".bin" in request.path for request in server.requests), name


def test_links_and_strange_names_in_a_repository_reach_nothing(
    ann: Worker, server: LocalHub, folder: Path, tmp_path: Path
) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    secret = tmp_path / "secret"
    secret.write_text("{}")
    name = foreign(server, "links", {**files, "sub/config.json": b"{}"}, symlinks={"labels.json": str(secret)})
    told = ann("load", checkpoint=name, cache_dir=str(tmp_path / "cache"))
    assert "labels.json is not valid JSON" in told["message"], told
    assert secret.read_text() == "{}"


def test_two_clients_pushing_at_once_both_arrive(
    workers: dict[str | None, Worker], ann: Worker, server: LocalHub, model: MDEQ, repository: str, tmp_path: Path
) -> None:
    server.add_user("ann2", token="hf_ann2", role="write")
    home = tmp_path / "home"
    home.mkdir()
    other = Worker(server.environment(home, token="hf_ann"), home)
    folders = []
    for index in range(2):
        changed = MDEQ(pooled_config(), labels=model.labels)
        changed.save_pretrained(tmp_path / f"checkpoint{index}")
        folders.append(tmp_path / f"checkpoint{index}")
    try:
        for _ in range(3):
            with ThreadPoolExecutor(2) as pool:
                jobs = [
                    pool.submit(worker, "push", folder=str(folder), repository=repository)
                    for worker, folder in zip((ann, other), folders, strict=True)
                ]
                done = [job.result() for job in jobs]
            assert all("error" not in entry for entry in done), done
            history = server.commits(repository, "main")
            last = [entry["commit"] for entry in done].index(history[0])
            # What is there is the whole of one of the two, never a mixture.
            assert (
                server.files(repository, "main")["model.safetensors"]
                == (folders[last] / "model.safetensors").read_bytes()
            )
            assert server.files(repository, "main")["config.json"] == (folders[last] / "config.json").read_bytes()
    finally:
        other.close()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/cache/blobs/x"),
            "the disk is full: /cache/blobs/x; free some space, or set HF_HOME",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full: "),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache/x"),
            "/cache/x cannot be written: Permission denied; set HF_HOME",
        ),
        (
            OSError("a proxy said no\nand more"),
            "ann/model at v1 cannot be fetched from the Hugging Face Hub: a proxy said no",
        ),
    ],
)
def test_a_machine_that_fails_is_one_line_too(error: OSError, message: str) -> None:
    try:
        raise RuntimeError("the client's own words") from error
    except RuntimeError as wrapped:
        told = explain(wrapped, "ann/model", "v1")
    assert isinstance(told, HubError)
    assert str(told).startswith(message)
    assert "\n" not in str(told)


def test_an_error_of_ours_is_not_called_the_hubs() -> None:
    with pytest.raises(ZeroDivisionError), explaining("ann/model"):
        _ = 1 / 0

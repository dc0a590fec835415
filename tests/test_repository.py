"""The repository itself: nothing in it points at one machine or at one package registry."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from shoal_core.machine import environment_for_copies

ROOT = Path(__file__).resolve().parent.parent

# In pieces, so that this file does not contain what it forbids.
REGISTRY_HOSTS = (
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "npmjs" + ".org",
    "npmjs" + ".com",
    "crates" + ".io",
    "proxy.golang" + ".org",
    "deb.debian" + ".org",
    "conda.anaconda" + ".org",
    "docker" + ".io/",
    "ghcr" + ".io",
    "quay" + ".io",
    "--index" + "-url",
    "--extra-index" + "-url",
    "--find" + "-links",
    "file:" + "///",
)


def tracked_texts() -> list[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [(str(path.relative_to(ROOT)), path.read_text(errors="replace")) for path in paths if path.is_file()]


def machine_paths() -> list[str]:
    """Where this checkout and its home folder lie; short paths such as ``/app`` would match by accident."""
    return [str(path) for path in (ROOT, Path.home()) if len(path.parts) > 2]


@pytest.mark.parametrize("text", [*REGISTRY_HOSTS, *machine_paths()])
def test_no_tracked_file_names_a_registry_or_this_machine(text: str) -> None:
    assert [name for name, content in tracked_texts() if text in content] == []


def test_every_pinned_requirement_has_a_hash() -> None:
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        pins = re.split(r"\n(?=[A-Za-z0-9])", path.read_text())
        unhashed = [pin.splitlines()[0] for pin in pins if "==" in pin.splitlines()[0] and "--hash=sha256:" not in pin]
        assert unhashed == [], path.name


def test_every_member_has_a_readme_and_is_typed() -> None:
    members = [path.parent for pattern in ("sdk/*", "services/*") for path in ROOT.glob(f"{pattern}/pyproject.toml")]
    assert len(members) == 6
    for member in members:
        assert (member / "README.md").is_file(), member
        assert list(member.glob("src/*/py.typed")), member


def test_the_image_has_the_environment_for_copies() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    assert all(f"ENV {name}={value}" in lines for name, value in environment_for_copies({}).items())

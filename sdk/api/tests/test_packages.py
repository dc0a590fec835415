"""Packing folders: what goes in, what stays out, and that the same contents are the same package."""

from __future__ import annotations

import io
import os
import types
import zipfile
from pathlib import Path

import pytest

from shoal import packages
from shoal.exceptions import RuntimeEnvSetupError
from shoal.packages import Rule, pack_folder, pack_module
from shoal.runtime_env import RuntimeEnv
from shoal_core.runtime.environments import unpack


def write(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def names(data: bytes) -> list[str]:
    return zipfile.ZipFile(io.BytesIO(data)).namelist()


def test_the_same_contents_are_the_same_package(tmp_path: Path) -> None:
    first = pack_folder(str(write(tmp_path / "a", "b.py", "deep/c.txt")))
    second = pack_folder(str(write(tmp_path / "z", "deep/c.txt", "b.py")))
    assert first == second
    assert names(first.data) == ["b.py", "deep/c.txt"]
    (tmp_path / "z" / "b.py").write_text("other")
    assert pack_folder(str(tmp_path / "z")).function_id != first.function_id


def test_unpacking_gives_back_files_modes_and_empty_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "from", "run.sh", "deep/data")
    (folder / "run.sh").chmod(0o755)
    (folder / "empty").mkdir()
    unpack(pack_folder(str(folder)).data, tmp_path / "to")
    assert (tmp_path / "to" / "deep" / "data").read_text() == "deep/data"
    assert os.access(tmp_path / "to" / "run.sh", os.X_OK)
    assert (tmp_path / "to" / "empty").is_dir()
    assert not (tmp_path / "to.new").exists()


def test_an_empty_folder_is_unpacked_as_one(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    unpack(pack_folder(str(tmp_path / "from")).data, tmp_path / "to")
    assert list((tmp_path / "to").iterdir()) == []


def test_what_was_not_unpacked_to_its_end_is_begun_anew(tmp_path: Path) -> None:
    write(tmp_path / "to.new", "half")
    unpack(pack_folder(str(write(tmp_path / "from", "whole"))).data, tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["whole"]


def test_some_things_stay_out(tmp_path: Path) -> None:
    folder = write(tmp_path, ".git/HEAD", "a.py", "__pycache__/a.pyc", "data/big.bin", "data/keep.bin", "x/.venv/lib")
    (folder / ".gitignore").write_text("# large\n/data/*\n!keep.bin\n")
    (folder / "nothing").symlink_to("/does/not/exist")
    assert names(pack_folder(str(folder)).data) == [".gitignore", "a.py", "data/keep.bin", "x/"]
    assert names(pack_folder(str(folder), ["*.py", "data/"]).data) == [".gitignore", "x/"]


def test_links_that_lead_in_circles_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "from", "inner/a")
    (folder / "inner" / "again").symlink_to(folder)
    assert names(pack_folder(str(folder)).data) == ["inner/a"]


@pytest.mark.parametrize(
    ("line", "meant", "not_meant"),
    [
        ("*.log", ["a.log", "x/y.log"], ["a.logs", "log"]),
        ("/a", ["a"], ["x/a"]),
        ("x/a", ["x/a"], ["y/x/a", "a"]),
        ("a?", ["ab", "x/ab"], ["a", "a/b", "abc"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "x/a/b"]),
        ("**/b", ["b", "a/b", "a/c/b"], ["ab"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "b"]),
        ("[ab].py", ["a.py", "x/b.py"], ["c.py"]),
        ("[!ab].py", ["c.py"], ["a.py"]),
        ("\\#a", ["#a"], ["a"]),
        ("a+(b)", ["a+(b)"], ["aab"]),
    ],
)
def test_patterns_are_those_of_gitignore(line: str, meant: list[str], not_meant: list[str]) -> None:
    rule = Rule(line)
    assert [path for path in meant if not rule.means(path, False)] == []
    assert [path for path in not_meant if rule.means(path, False)] == []


def test_a_pattern_may_mean_folders_only() -> None:
    assert Rule("a/").means("x/a", True)
    assert not Rule("a/").means("x/a", False)


def test_a_module_keeps_its_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", "__init__.py", "deep/part.py")
    assert names(pack_module(str(folder)).data) == ["mine/__init__.py", "mine/deep/part.py"]
    assert names(pack_module(str(folder / "deep" / "part.py")).data) == ["part.py"]
    imported = types.ModuleType("mine")
    imported.__path__ = [str(folder)]
    assert pack_module(imported) == pack_module(str(folder))


def test_a_zip_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "code.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.py", "A = 1")
    assert pack_folder(str(path)).data == path.read_bytes()


def test_a_wheel_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mine/__init__.py", "A = 1")
        archive.writestr("mine-1.0.dist-info/METADATA", "Name: mine")
    assert pack_module(str(path)).data == path.read_bytes()
    assert RuntimeEnv(py_modules=[str(path)])
    (tmp_path / "broken.whl").touch()
    with pytest.raises(ValueError, match="broken"):
        RuntimeEnv(py_modules=[str(tmp_path / "broken.whl")])


def test_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MOST_BYTES", 1000)
    (tmp_path / "noise").write_bytes(os.urandom(2000))
    with pytest.raises(RuntimeEnvSetupError, match=r"1,000 bytes.*excludes"):
        pack_folder(str(tmp_path))
    assert names(pack_folder(str(tmp_path), ["noise"]).data) == []

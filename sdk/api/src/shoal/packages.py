"""Folders on their way to worker processes: packed as zip files, the same bytes for the same contents."""

from __future__ import annotations

import io
import os
import re
import types
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal_core.protocol.errors import RuntimeEnvSetupError
from shoal_core.runtime.tasks.functions import Exported, digest

MOST_BYTES = 100 * 1024 * 1024
ALWAYS_LEFT_OUT = (".git/", "__pycache__/", ".venv/", "venv/")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def pack_folder(folder: str, excludes: Sequence[str] = ()) -> Exported:
    """Pack the contents of a folder, or take a zip file as it is.

    Left out is what ``excludes`` and the folder's own ``.gitignore`` say, and ``ALWAYS_LEFT_OUT``. Raises
    ``RuntimeEnvSetupError`` where more than ``MOST_BYTES`` are left, or something cannot be read.
    """
    if os.path.isfile(folder):
        return _exported(folder, _read(folder))
    return _pack(folder, _files(Path(folder), _rules(Path(folder), excludes)), "")


def pack_module(module: str | types.ModuleType, excludes: Sequence[str] = ()) -> Exported:
    """Pack what is to be imported, under its name: a folder, a file ``*.py``, or a module that was imported.

    A wheel is taken as it is: unpacked it is importable, where it fits the nodes' interpreter.
    """
    path = module if isinstance(module, str) else _path_of(module)
    whole = Path(path).resolve()
    if whole.suffix == ".whl":
        return _exported(path, _read(path))
    if whole.is_file():
        return _pack(path, iter([(whole.name, whole)]), "")
    return _pack(path, _files(whole, _rules(whole, excludes)), f"{whole.name}/")


def _path_of(module: types.ModuleType) -> str:
    folders = list(getattr(module, "__path__", ()))
    return str(folders[0]) if folders else str(module.__file__)


def _pack(what: str, files: Iterator[tuple[str, Path]], inside: str) -> Exported:
    buffer = io.BytesIO()
    try:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in files:
                entry = zipfile.ZipInfo(inside + name, _EPOCH)
                entry.external_attr = (path.stat().st_mode & 0xFFFF) << 16
                if name.endswith("/"):
                    archive.writestr(entry, b"")
                    continue
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.file_size = path.stat().st_size  # decides in which format a large one is written
                with path.open("rb") as source, archive.open(entry, "w") as target:
                    while block := source.read(1 << 20):
                        target.write(block)
                        _check(what, buffer.tell())
    except OSError as error:
        raise RuntimeEnvSetupError(f"{what!r} cannot be packed for the worker processes: {error}") from error
    return _exported(what, buffer.getvalue())


def _read(path: str) -> bytes:
    try:
        _check(path, os.path.getsize(path))
        return Path(path).read_bytes()
    except OSError as error:
        raise RuntimeEnvSetupError(f"{path!r} cannot be read: {error}") from error


def _exported(what: str, data: bytes) -> Exported:
    _check(what, len(data))
    return Exported(digest(data), data)


def _check(what: str, size_bytes: int) -> None:
    if size_bytes > MOST_BYTES:
        raise RuntimeEnvSetupError(
            f"{what!r} has more than {MOST_BYTES:,} bytes when packed, and no more are sent to worker processes. Name "
            "what they do not need in 'excludes', or put large files where all nodes can read them."
        )


# ------------------------------------------------------------------------------------ what is left out


class Rule:
    """One line of a ``.gitignore``: which paths it means, and whether it leaves them out or takes them in again."""

    def __init__(self, line: str) -> None:
        self.leaves_out = not line.startswith("!")
        pattern = line.removeprefix("!").removeprefix("\\")
        self.folders_only = pattern.endswith("/")
        self._matches = re.compile(_translated(pattern.rstrip("/"))).fullmatch

    def means(self, path: str, is_folder: bool) -> bool:
        """Tell whether the line is about a path, relative to the folder that is packed."""
        return (is_folder or not self.folders_only) and self._matches(path) is not None


def _translated(pattern: str) -> str:
    """Return a pattern of a ``.gitignore`` as a regular expression over relative paths."""
    parts = pattern.strip("/").split("/")
    text = "" if "/" in pattern else "(?:.*/)?"
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        if part == "**":
            text += ".+" if is_last else "(?:.*/)?"
        else:
            text += _segment(part) + ("" if is_last else "/")
    return text


_SPECIAL = re.compile(r"\\.|\[[!^]?\]?[^\]/]*\]|\*+|\?|.", re.DOTALL)


def _segment(part: str) -> str:
    text = ""
    for token in _SPECIAL.findall(part):
        if token[0] == "*":
            text += "[^/]*"
        elif token == "?":
            text += "[^/]"
        elif token[0] == "[" and len(token) > 1:
            text += "[^" + token[2:] if token[1] in "!^" else token
        else:
            text += re.escape(token[-1])
    return text


def _rules(folder: Path, excludes: Sequence[str]) -> list[Rule]:
    own = folder / ".gitignore"
    lines = own.read_text(errors="replace").splitlines() if own.is_file() else []
    lines = [line.rstrip() for line in (*ALWAYS_LEFT_OUT, *lines, *excludes)]
    return [Rule(line) for line in lines if line and not line.startswith("#")]


def _is_left_out(path: str, is_folder: bool, rules: Sequence[Rule]) -> bool:
    """Tell what the last rule says that is about a path."""
    return next((rule.leaves_out for rule in reversed(rules) if rule.means(path, is_folder)), False)


def _files(folder: Path, rules: Sequence[Rule]) -> Iterator[tuple[str, Path]]:
    """Yield the files of a folder in order, by their relative paths, and folders (ending in "/") that are empty."""
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(where)
        relative = os.path.relpath(where, folder).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        if here in seen:  # a link to what was packed already may lead round in circles
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not _is_left_out(prefix + name, True, rules))
        files = [name for name in sorted(names) if not _is_left_out(prefix + name, False, rules)]
        if prefix and not folders and not files:
            yield prefix, Path(where)
        for name in files:
            path = Path(where) / name
            if path.is_file():  # no socket, no pipe, no link to nothing
                yield prefix + name, path

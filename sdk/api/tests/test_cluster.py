"""What is known of the lasting cluster of this machine, and what keeps one from being started."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from shoal.cluster import HostInfo, HostOptions, read_current, running_at, start_host


def test_a_process_that_got_the_pid_of_a_host_that_is_gone_is_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    written = tmp_path / f"shoal-{os.getuid()}" / "current.json"
    written.parent.mkdir()
    info = HostInfo("nats://127.0.0.1:1", "default", str(tmp_path / "gone.json"), os.getpid(), str(tmp_path / "gone"))
    written.write_text(json.dumps(asdict(info)))
    assert read_current() is None


def test_what_others_leave_in_place_of_a_cluster_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("shoal-pipe", "shoal-link"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "shoal-pipe" / "host.json")  # reading it would never end
    (tmp_path / "shoal-link" / "host.json").symlink_to(tmp_path / "shoal-pipe" / "host.json")
    assert running_at("nats://127.0.0.1:1") is None


@pytest.mark.parametrize("text", ["banana", "0", "-1", "1.1", "nan"])
def test_a_threshold_that_is_no_share_is_refused_before_anything_starts(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_MEMORY_THRESHOLD", text)
    with pytest.raises(ValueError, match=f"SHOAL_MEMORY_THRESHOLD.*{text}"):
        start_host(HostOptions(), lasting=False)


@pytest.mark.parametrize(
    ("variable", "text"),
    [("SHOAL_ROTATION_MAX_BYTES", "1023"), ("SHOAL_ROTATION_BACKUP_COUNT", "-1"), ("SHOAL_LOG_BYTES", "1e9")],
)
def test_limits_of_logs_that_make_no_sense_are_refused_before_anything_starts(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ValueError, match=f"{variable} must be a whole number.*{text}"):
        start_host(HostOptions(), lasting=False)

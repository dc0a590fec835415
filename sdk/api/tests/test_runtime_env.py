"""``RuntimeEnv``: what its keys take, and the error for each wrong value."""

from __future__ import annotations

import json
import math
import pickle
import types
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.environments import pack
from shoal.runtime_env import RuntimeEnv, RuntimeEnvConfig
from shoal.runtime_env.runtime_env import checked


def nothing() -> None:
    """A hook."""


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"env_vars": {"A": 1}}, TypeError, "'A': 1"),
        ({"env_vars": {"": "a"}}, ValueError, "no environment can"),
        ({"env_vars": {"A=B": "a"}}, ValueError, "no environment can"),
        ({"working_dir": 1}, TypeError, "working_dir.*int"),
        ({"working_dir": "s3://bucket/code.zip"}, ValueError, "existing folder or zip file"),
        ({"py_modules": "here"}, TypeError, "list"),
        ({"py_modules": [1]}, TypeError, "1"),
        ({"py_modules": ["/not/there"]}, ValueError, "/not/there"),
        ({"py_modules": [types.ModuleType("mine")]}, ValueError, "mine"),
        ({"excludes": "*.py"}, TypeError, "excludes"),
        ({"worker_process_setup_hook": 1}, TypeError, "int"),
        ({"worker_process_setup_hook": "setup"}, ValueError, "'module.function'"),
        ({"config": 1}, TypeError, "config"),
        ({"config": {"timeout": 1}}, ValueError, "timeout"),
        ({"config": {"setup_timeout_seconds": 0}}, ValueError, "greater than zero"),
        ({"config": {"setup_timeout_seconds": "1"}}, TypeError, "str"),
        ({"config": {"eager_install": 1}}, TypeError, "eager_install"),
        ({"pip": ["requests"]}, ValueError, r"'pip'.*not supported.*py_modules"),
        ({"conda": {}}, ValueError, "conda"),
        ({"uv": []}, ValueError, "uv"),
        ({"container": {}}, ValueError, "container"),
        ({"image_uri": "a"}, ValueError, "image_uri"),
        ({"spam": 1}, ValueError, "no key 'spam'"),
    ],
)
def test_each_wrong_value_is_an_error_wherever_it_is_given(
    fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        RuntimeEnv(**fields)
    with pytest.raises(error, match=says):
        shoal.remote(runtime_env=fields)(nothing)
    with pytest.raises(error, match=says):
        shoal.remote(nothing).options(runtime_env=fields)
    with pytest.raises(error, match=says):
        shoal.remote(type("A", (), {})).options(runtime_env=fields)


def test_it_is_a_dictionary(tmp_path: Path) -> None:
    one = RuntimeEnv(env_vars={"A": "1"}, working_dir=str(tmp_path), py_modules=None)
    assert one == {"env_vars": {"A": "1"}, "working_dir": str(tmp_path)}
    assert checked(dict(one)) == one == RuntimeEnv.deserialize(one.serialize()) == pickle.loads(pickle.dumps(one))
    assert (one.env_vars(), one.has_working_dir(), one.working_dir()) == ({"A": "1"}, True, str(tmp_path))
    one.set("working_dir", None)
    assert one.to_dict() == {"env_vars": {"A": "1"}}
    with pytest.raises(TypeError):
        one["env_vars"] = ["A"]
    assert shoal.runtime_env.RuntimeEnv is RuntimeEnv


def test_one_that_was_checked_elsewhere_is_not_checked_again(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    pickled = pickle.dumps(RuntimeEnv(working_dir=str(tmp_path / "here")))
    (tmp_path / "here").rmdir()
    assert pickle.loads(pickled)["working_dir"] == str(tmp_path / "here")


def test_the_config_has_defaults() -> None:
    assert RuntimeEnvConfig().to_dict() == {"setup_timeout_seconds": 600, "eager_install": True}
    assert RuntimeEnv(config={"setup_timeout_seconds": -1})["config"] == RuntimeEnvConfig(setup_timeout_seconds=-1)


def test_packing_leaves_nothing_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("A = 1")
    given = {
        "working_dir": str(tmp_path),
        "py_modules": [str(tmp_path), str(tmp_path / "a.py"), json],
        "excludes": ["*.log"],
        "worker_process_setup_hook": nothing,
        "env_vars": {"A": "1"},
    }
    packed = pack(given)
    assert str(tmp_path) not in json.dumps(packed.fields)
    assert "excludes" not in packed.fields
    assert len(packed.exports) == 5
    again = pack(packed.fields)
    assert (again.fields, list(again.exports)) == (packed.fields, []), "what is packed is packed"


def test_nothing_is_packed_of_nothing() -> None:
    assert pack(None).fields == pack({}).fields == {}


def test_a_module_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match="math"):
        RuntimeEnv(py_modules=[types.ModuleType(math.__name__)])

"""``init``: what it refuses before anything starts, and joining twice."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import session
from shoal.driver import DriverOptions
from shoal.job_config import JobConfig


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold that no cluster is looked for and none is started."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a cluster was looked for or started")

    for name in ("read_current", "start_host", "driver_session"):
        monkeypatch.setattr(session, name, refuse)
    monkeypatch.delenv("SHOAL_ADDRESS", raising=False)
    yield
    assert not shoal.is_initialized()


@pytest.mark.usefixtures("nothing_starts")
class TestRefusals:
    def test_unknown_parameters_are_named(self) -> None:
        with pytest.raises(RuntimeError, match=r"init\(\): num_cpu, spam\."):
            shoal.init(spam=1, num_cpu=2, include_dashboard=False)

    @pytest.mark.parametrize("resource", ["CPU", "GPU"])
    def test_processors_have_parameters_of_their_own(self, resource: str) -> None:
        with pytest.raises(ValueError, match=f"num_{resource.lower()}s"):
            shoal.init(resources={resource: 1})

    @pytest.mark.parametrize("name", ["num_cpus", "num_gpus", "object_store_memory"])
    def test_a_wrong_number_is_named(self, name: str) -> None:
        wrong: dict[str, Any] = {name: "many"}
        with pytest.raises(TypeError, match=name):
            shoal.init(**wrong)
        wrong = {name: -1}
        with pytest.raises(ValueError, match=name):
            shoal.init(**wrong)

    def test_local_mode_is_refused_with_what_to_do_instead(self) -> None:
        with pytest.raises(ValueError, match=r"init\(num_cpus=1\)"):
            shoal.init(local_mode=True)

    @pytest.mark.parametrize(
        ("parameters", "error", "says"),
        [
            ({"namespace": 1}, TypeError, "namespace"),
            ({"namespace": ""}, ValueError, "namespace"),
            ({"runtime_env": {"pip": ["requests"]}}, ValueError, "pip"),
            ({"runtime_env": ["env_vars"]}, TypeError, "runtime_env must be a dict or a RuntimeEnv, got list"),
            ({"runtime_env": "env_vars"}, TypeError, "runtime_env must be a dict or a RuntimeEnv, got str"),
            ({"runtime_env": 0}, TypeError, "runtime_env must be a dict or a RuntimeEnv, got int"),
            ({"runtime_env": {1: 2, "pip": []}}, ValueError, "no key 1"),
            ({"runtime_env": {"env_vars": {"A": 1}}}, TypeError, "env_vars.*'A': 1"),
            ({"runtime_env": {"env_vars": {1: "A"}}}, TypeError, "env_vars.*1: 'A'"),
            ({"runtime_env": {"env_vars": ["A"]}}, TypeError, "env_vars.*list"),
            ({"runtime_env": {"working_dir": Path("/")}}, TypeError, "working_dir.*a str"),
            ({"runtime_env": {"working_dir": ""}}, ValueError, "working_dir.*existing folder"),
            ({"runtime_env": {"working_dir": __file__}}, ValueError, "working_dir.*existing folder"),
            ({"runtime_env": {"working_dir": "/not/here"}}, ValueError, "working_dir.*'/not/here'"),
            ({"logging_level": "loud"}, ValueError, "LOUD"),
        ],
    )
    def test_a_wrong_parameter_of_the_job_is_named(
        self, parameters: dict[str, Any], error: type[Exception], says: str
    ) -> None:
        with pytest.raises(error, match=says):
            shoal.init(**parameters)


def test_the_parameters_of_the_job_are_kept(tmp_path: Path) -> None:
    environment = {"env_vars": {"A": "1"}, "working_dir": str(tmp_path)}
    options = DriverOptions.of("mine", environment, None, False, logging.INFO)
    assert (options.namespace, options.log_to_driver) == ("mine", False)
    assert options.environment.fields["env_vars"] == {"A": "1"}
    (package,) = options.environment.exports
    assert options.environment.fields["working_dir"] == f"gcs://{package.function_id}.zip"
    assert options != DriverOptions.of("mine", environment, None, True, logging.INFO)


@pytest.mark.parametrize("level", ["warning", "WARNING", logging.WARNING])
def test_the_level_of_the_log_is_a_name_or_a_number(level: str | int) -> None:
    logger = logging.getLogger("shoal")
    before = logger.level
    try:
        DriverOptions.of(None, None, None, True, level)
        assert logger.level == logging.WARNING
    finally:
        logger.setLevel(before)


def test_what_init_says_itself_comes_before_the_job_config() -> None:
    config = JobConfig(runtime_env={"env_vars": {"A": "1"}}, metadata={"team": "a"}, ray_namespace="mine")
    options = DriverOptions.of(None, None, config, True, logging.INFO)
    assert (options.namespace, options.metadata) == ("mine", {"team": "a"})
    assert options.environment.fields == {"env_vars": {"A": "1"}}
    options = DriverOptions.of("ours", {"env_vars": {"B": "2"}}, config, True, logging.INFO)
    assert (options.namespace, options.environment.fields) == ("ours", {"env_vars": {"B": "2"}})


def test_a_job_config_is_made_of_json() -> None:
    config = JobConfig.from_json({"runtime_env": {"env_vars": {"A": "1"}}, "ray_namespace": "mine"})
    assert (config.runtime_env, config.ray_namespace, config.metadata) == ({"env_vars": {"A": "1"}}, "mine", {})
    with pytest.raises(ValueError, match="jvm_options"):
        JobConfig.from_json({"jvm_options": []})


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"metadata": {"team": 1}}, TypeError),
        ({"ray_namespace": 1}, TypeError),
        ({"ray_namespace": ""}, ValueError),
        ({"runtime_env": {"pip": ["requests"]}}, ValueError),
        ({"default_actor_lifetime": "detached"}, ValueError),
        ({"default_actor_lifetime": "for ever"}, ValueError),
    ],
)
def test_a_wrong_job_config_is_refused_where_it_is_made(wrong: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        JobConfig(**wrong)
    with pytest.raises(TypeError, match="JobConfig"):
        DriverOptions.of(None, None, {"metadata": {}}, True, logging.INFO)


def test_later_changes_of_the_environment_change_nothing() -> None:
    variables = {"A": "1"}
    options = DriverOptions.of(None, {"env_vars": variables}, None, True, logging.INFO)
    variables["A"] = "2"
    assert options.environment.fields == {"env_vars": {"A": "1"}}


def test_a_namespace_of_its_own_is_drawn_for_each_job() -> None:
    first, second = (DriverOptions.of(None, None, None, True, logging.INFO).namespace for _ in range(2))
    assert first
    assert first != second


def test_joining_twice_is_an_error_unless_it_is_to_be_ignored() -> None:
    with shoal.init("local", num_cpus=1, namespace="mine", include_dashboard=False) as context:
        assert shoal.is_initialized()
        assert context["namespace"] == "mine"
        assert dict(context) == context.address_info
        assert context.address_info["address"] == context["gcs_address"] == shoal.get_runtime_context().gcs_address
        assert context["node_id"] == shoal.get_runtime_context().get_node_id()
        with pytest.raises(RuntimeError, match="ignore_reinit_error"):
            shoal.init(num_cpus=1)
        assert shoal.init(num_cpus=1, ignore_reinit_error=True) is context
        assert shoal.is_initialized()
    assert not shoal.is_initialized()
    shoal.shutdown()

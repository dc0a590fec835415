"""What the package offers: no name is offered that is not there, none is there that is not offered."""

from __future__ import annotations

import importlib
import types

import pytest

import shoal
from shoal import exceptions
from shoal.util.placement_group import PlacementGroup
from shoal_core.protocol import errors
from shoal_core.protocol.errors import ShoalError

PROGRAMS_RELY_ON = [
    "ObjectID",
    "ObjectRef",
    "PlacementGroupID",
    "RemoteFunction",
    "ActorID",
    "JobID",
    "LoggingConfig",
    "NodeID",
    "TaskID",
    "WorkerID",
    "__commit__",
    "__version__",
    "available_resources",
    "cloudpickle",
    "cluster_resources",
    "exceptions",
    "get",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "nodes",
    "put",
    "remote",
    "runtime_context",
    "shutdown",
    "timeline",
    "wait",
]

RAYS_ERRORS = [
    "ActorDiedError",
    "ActorPlacementGroupRemoved",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "AsyncioActorExit",
    "CrossLanguageError",
    "GetTimeoutError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectFetchTimedOutError",
    "ObjectFreedError",
    "ObjectLostError",
    "ObjectReconstructionFailedError",
    "ObjectReconstructionFailedLineageEvictedError",
    "ObjectReconstructionFailedMaxAttemptsExceededError",
    "ObjectRefStreamEndOfStreamError",
    "ObjectStoreFullError",
    "OufOfBandObjectRefSerializationException",
    "OutOfDiskError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceeded",
    "PlasmaObjectNotAvailable",
    "RayActorError",
    "RayChannelError",
    "RayChannelTimeoutError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
    "ReferenceCountingAssertionError",
    "RpcError",
    "RuntimeEnvSetupError",
    "TaskCancelledError",
    "TaskPlacementGroupRemoved",
    "TaskUnschedulableError",
    "UserCodeException",
    "WorkerCrashedError",
]


RAYS_UTIL = [
    "ActorPool",
    "accelerators",
    "as_completed",
    "check_serialize",
    "connect",
    "deregister_serializer",
    "disable_log_once_globally",
    "disconnect",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "queue",
    "register_serializer",
    "remove_placement_group",
    "state",
]

RAYS_NAMES_OF_REFERENCES = [
    *("binary", "hex", "is_nil", "nil", "from_random", "task_id", "job_id", "future"),
    *("__await__", "__hash__", "__eq__", "_on_completed"),
]


def public(module: types.ModuleType) -> set[str]:
    """Return the names of a module that are neither private nor its submodules."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_shoal_offers_what_it_defines_and_nothing_else() -> None:
    modules = {name for name in shoal.__all__ if isinstance(getattr(shoal, name), types.ModuleType)}
    assert public(shoal) | modules | {"__version__", "__commit__"} == set(shoal.__all__)
    assert set(PROGRAMS_RELY_ON) <= set(shoal.__all__)
    assert len(set(shoal.__all__)) == len(shoal.__all__)


def test_util_offers_what_programs_rely_on() -> None:
    assert set(RAYS_UTIL) <= set(shoal.util.__all__)
    assert all(hasattr(shoal.util, name) for name in shoal.util.__all__)
    assert len(set(shoal.util.__all__)) == len(shoal.util.__all__)


def test_placement_group_is_a_function_and_a_module() -> None:
    module = importlib.import_module("shoal.util.placement_group")
    assert shoal.util.placement_group is module.placement_group
    assert set(module.__all__) == public(module)
    assert [module.PlacementGroup, module.PlacementGroupID] == [PlacementGroup, shoal.PlacementGroupID]


@pytest.mark.parametrize(
    ("module", "name"), [("_raylet", "ObjectRef"), ("_raylet", "ObjectRefGenerator"), ("util.debug", "log_once")]
)
def test_modules_have_the_names_that_rays_documentation_imports_from_them(module: str, name: str) -> None:
    offered = getattr(importlib.import_module(f"shoal.{module}"), name)
    assert offered is getattr(shoal, name, None) or offered is getattr(shoal.util, name, None)


@pytest.mark.parametrize("name", RAYS_NAMES_OF_REFERENCES)
def test_references_have_rays_names(name: str) -> None:
    assert hasattr(shoal.ObjectRef, name)
    assert shoal.ObjectID is shoal.ObjectRef


def test_all_errors_of_the_tree_are_offered_under_their_own_names() -> None:
    tree = {
        name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, ShoalError)
    }
    assert set(exceptions.__all__) == public(exceptions)
    assert {name: getattr(exceptions, name, None) for name in tree} == tree
    assert len(set(exceptions.__all__)) == len(exceptions.__all__)


def test_every_offered_error_is_of_the_one_root() -> None:
    for name in exceptions.__all__:
        assert issubclass(getattr(exceptions, name), exceptions.ShoalError), name


@pytest.mark.parametrize("name", RAYS_ERRORS)
def test_rays_names_of_errors_are_there(name: str) -> None:
    error = getattr(exceptions, name)
    assert name in exceptions.__all__
    assert issubclass(error, exceptions.RayError)


@pytest.mark.parametrize(
    ("rays", "ours"),
    [
        ("RayError", "ShoalError"),
        ("RayTaskError", "TaskError"),
        ("RayActorError", "ActorError"),
        ("RayChannelError", "ChannelError"),
        ("RayChannelTimeoutError", "ChannelTimeoutError"),
        ("LocalRayletDiedError", "LocalNodeDiedError"),
        ("RpcError", "BusError"),
    ],
)
def test_rays_names_mean_our_classes(rays: str, ours: str) -> None:
    assert getattr(exceptions, rays) is getattr(exceptions, ours)


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("ClusterUnreachableError", "ConnectionFailedError"),
        ("AuthenticationError", "ConnectionFailedError"),
        ("JetStreamUnavailableError", "ConnectionFailedError"),
        ("VersionMismatchError", "ConnectionFailedError"),
        ("ActorDiedError", "RayActorError"),
        ("ActorUnavailableError", "RayActorError"),
        ("RayChannelError", "RaySystemError"),
        ("RayChannelTimeoutError", "RayChannelError"),
        ("ObjectFreedError", "ObjectLostError"),
        ("ObjectFetchTimedOutError", "ObjectLostError"),
        ("OwnerDiedError", "ObjectLostError"),
        ("ReferenceCountingAssertionError", "ObjectLostError"),
        ("ObjectReconstructionFailedError", "ObjectLostError"),
        ("ObjectReconstructionFailedLineageEvictedError", "ObjectReconstructionFailedError"),
        ("ObjectReconstructionFailedMaxAttemptsExceededError", "ObjectReconstructionFailedError"),
    ],
)
def test_the_tree_of_errors_has_its_branches(lower: str, upper: str) -> None:
    assert issubclass(getattr(exceptions, lower), getattr(exceptions, upper))


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConnectionFailedError", ConnectionError),
        ("GetTimeoutError", TimeoutError),
        ("RayChannelTimeoutError", TimeoutError),
        ("ReferenceCountingAssertionError", AssertionError),
        ("ActorAlreadyExistsError", ValueError),
        ("PlacementGroupAlreadyExistsError", ValueError),
    ],
)
def test_errors_are_caught_by_the_builtin_classes_that_mean_them(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(exceptions, name), builtin)

"""``@remote``: functions become tasks, classes become actors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from shoal import actor_options
from shoal import options as task_options
from shoal.actor import ActorClass
from shoal.remote_function import RemoteFunction

P = ParamSpec("P")
R = TypeVar("R")
T_co = TypeVar("T_co", covariant=True)


class Class(Protocol[P, T_co]):
    """A class, as opposed to any other callable: it has bases."""

    @property
    def __mro__(self) -> tuple[type, ...]:
        """The class and its bases."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Make an instance."""


class Decorator(Protocol):
    """What ``@remote(...)`` returns: it makes a function or a class remote."""

    @overload
    def __call__(self, cls: Class[P, T_co], /) -> ActorClass[T_co, P]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload
def remote(cls: Class[P, T_co], /) -> ActorClass[T_co, P]: ...  # type: ignore[overload-overlap]


@overload
def remote(function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload
def remote(**options: Any) -> Decorator: ...


def remote(*args: Any, **options: Any) -> Any:
    """Make a function or a class remote: ``@remote``, ``@remote(num_cpus=2, ...)`` or ``remote(function)``.

    Options of both: ``num_cpus``, ``num_gpus``, ``memory`` (bytes), ``resources`` ({name: amount}),
    ``accelerator_type``, ``name``, ``scheduling_strategy`` ("DEFAULT", "SPREAD" or an object of
    ``shoal.util.scheduling_strategies``), ``label_selector`` ({key: "v", "!v", "in(a,b)" or "!in(a,b)"}), and
    ``fallback_strategy`` (a list of {"label_selector": …} that are tried in turn), ``priority`` (0, or that of the
    task which submits it: what has a higher one goes before other work of the same program), and ``runtime_env`` (see
    ``shoal.runtime_env``).

    Of functions: ``num_cpus`` is 1 unless given; ``num_returns`` (1), ``max_retries`` (3; -1 without end) for crashes
    of the worker, ``retry_exceptions`` (False; True or a list of classes) for exceptions, ``max_calls`` (0: a worker
    process runs any number).

    Of classes: one CPU is needed to place an actor, and none while it runs, unless ``num_cpus`` is given;
    ``namespace``, ``lifetime`` ("detached": it outlives its creator), ``get_if_exists``, ``max_concurrency`` (1; 1,000
    for async actors), ``concurrency_groups`` ({name: number}), ``max_restarts`` (0), ``max_task_retries`` (0),
    ``max_pending_calls`` (-1: any number), ``allow_out_of_order_execution``.

    An unknown option and an impossible value are a ``ValueError`` here, a wrong type is a ``TypeError``.
    """
    if len(args) == 1 and not options:
        return _make(args[0], {})
    if args or not options:
        raise TypeError(
            "The @remote decorator must be applied either with no arguments and no parentheses, for example '@remote', "
            "or with keyword arguments alone, for example '@remote(num_returns=2, resources={\"GPU_type\": 1})'."
        )
    unknown = [
        name for name in options if not (name in task_options.TASK_OPTIONS or name in actor_options.ACTOR_OPTIONS)
    ]
    if unknown:
        known = sorted({*task_options.TASK_OPTIONS, *actor_options.ACTOR_OPTIONS})
        raise ValueError(f"Invalid option keyword {unknown[0]!r} for @remote. Valid ones are {known}.")
    return lambda target: _make(target, options)


def _make(target: Any, options: dict[str, Any]) -> Any:
    if isinstance(target, (RemoteFunction, ActorClass)):
        raise TypeError(f"{target!r} is remote already; use .options(...) to change its options.")
    if inspect.isclass(target):
        if abstract := getattr(target, "__abstractmethods__", None):
            missing = ", ".join(sorted(abstract))
            raise TypeError(f"The class {target.__name__} is abstract and cannot be an actor: it has no {missing}.")
        return ActorClass(target, options)
    if not callable(target) or not hasattr(target, "__name__"):
        raise TypeError(f"The @remote decorator must be applied to a function or a class, got {target!r}.")
    if inspect.iscoroutinefunction(target):
        raise ValueError(
            "'async def' functions cannot be remote tasks; wrap the coroutine: asyncio.run(...) in a function, or make "
            "it a method of an async actor."
        )
    return RemoteFunction(target, options)

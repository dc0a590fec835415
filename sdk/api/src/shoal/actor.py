"""Actors: what ``@remote`` makes of a class, and what one does with actors beside calling them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeVar, overload

import msgspec
from typing_extensions import ParamSpec

from shoal import actor_options
from shoal.actor_options import ActorOptions
from shoal.environments import Packed, environment_of, pack, travelling
from shoal.exports import Export, Known
from shoal.handle import (
    ActorHandle,
    ActorMethod,
    HandleDescription,
    MethodDescription,
    describe_method,
    handle_of,
    new_handle,
)
from shoal.placement import place
from shoal.session import runtime
from shoal.signature import Arguments
from shoal_core.protocol.actors import (
    MOST_CODE_BYTES,
    MOST_METHODS_BYTES,
    MOST_SPEC_BYTES,
    ActorDescription,
    ActorList,
    ActorRecord,
    FindActor,
    ListActors,
    OpenActorJob,
)
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import JobRecord
from shoal_core.protocol.placement import Strategy
from shoal_core.protocol.records import InGroup
from shoal_core.protocol.resources import to_amounts
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.ownership.streams import STREAMING
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.worker.hosting import ActorExit, ActorSpec, is_async

T = TypeVar("T")
P = ParamSpec("P", default=...)
F = TypeVar("F", bound=Callable[..., Any])

METHOD_MARK = "__shoal_method__"


ActorProxy = ActorHandle
"""Ray's name for the type of a handle: ``ActorProxy[Cls]``."""


class ActorClassInheritanceException(TypeError):
    """An actor class was used as a base class; inherit from the plain class, and make the result remote."""


class ActorClass(Generic[T, P]):
    """A class whose instances live in worker processes of their own, one for each ``.remote(...)``.

    ``Cls.remote(...)`` asks for an actor and returns a handle at once; ``Cls.options(...)`` is the same class with
    other options. What goes wrong when the instance is made comes out of every call, as ``ActorDiedError``.
    As a type it is ``ActorClass[Cls]``, or ``ActorClass[Cls, [int, str]]`` with what ``__init__`` takes.
    """

    def __init__(self, cls: type[T], options: dict[str, Any]) -> None:
        actor_options.check_actor(options)
        functools.update_wrapper(self, cls, updated=())
        self._cls = cls
        self._options = options
        self._resolved = actor_options.resolve_actor(options)
        self._export = Export(cls)
        self._arguments = Arguments(cls, f"{cls.__name__}")
        self._members: tuple[dict[str, MethodDescription], dict[str, Arguments]] | None = None
        self._packed: Packed | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        """Raise ``TypeError``: actors are not instantiated directly."""
        name = self._cls.__name__
        raise TypeError(f"Actors cannot be instantiated directly. Instead of '{name}()', use '{name}.remote()'.")

    if not TYPE_CHECKING:  # which would find every attribute then

        def __getattr__(self, name: str) -> Any:
            """Return an attribute of the class itself: a constant, a static method."""
            if name.startswith("__") or "_cls" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return getattr(self._cls, name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> NoReturn:
        raise ActorClassInheritanceException(
            f"Attempted to define a subclass of the actor class {self._cls.__name__!r}. Inheriting from actor classes "
            "is not supported: inherit from the class before it is made remote, and make the subclass remote too."
        )

    @overload
    def remote(self, *args: P.args, **kwargs: P.kwargs) -> ActorHandle[T]: ...

    # A reference may stand for a value, as in calls of remote functions.
    @overload
    def remote(self, ref0: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ActorHandle[T]: ...

    @overload
    def remote(self, arg0: Any, ref1: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ActorHandle[T]: ...

    @overload
    def remote(self, arg0: Any, arg1: Any, ref2: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ActorHandle[T]: ...

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle[T]:
        """Ask for an actor and return its handle, without waiting for it.

        One with a name waits until the name is decided. Raises ``TypeError`` where the arguments do not fit
        ``__init__`` or cannot be pickled, and ``ActorAlreadyExistsError`` (a ``ValueError``) where the name is taken
        and ``get_if_exists`` is not set.
        """
        self._arguments.check(args, kwargs)
        return _create(self, runtime(), args, kwargs)

    def options(self, **options: Any) -> ActorClass[T, P]:
        """Return this class with some options replaced; those not named stay as they are."""
        actor_options.check_actor(options, in_options=True)
        changed: ActorClass[T, P] = ActorClass(self._cls, {**self._options, **options})
        changed._export = self._export
        return changed

    def _remote(self, args: Any = (), kwargs: Any = None, **options: Any) -> ActorHandle[T]:
        """Create with arguments and options given as values (a name that Ray programs use)."""
        target: Any = self.options(**options) if options else self
        handle: ActorHandle[T] = target.remote(*(args or ()), **(kwargs or {}))
        return handle

    def __reduce__(self) -> tuple[Any, ...]:
        # In two steps, so that a class may refer to itself: the object exists before its parts are pickled.
        return object.__new__, (ActorClass,), (self._cls, travelling(self._options), self._export.known)

    def __setstate__(self, state: tuple[type[T], dict[str, Any], Known | None]) -> None:
        cls, options, known = state
        self.__init__(cls, options)  # type: ignore[misc]
        self._export = Export(cls, known=known)

    def members(self) -> tuple[dict[str, MethodDescription], dict[str, Arguments]]:
        """Return what handles know of the methods, and the arguments they take.

        Raises ``ValueError`` for a method in a concurrency group that there is not.
        """
        if self._members is None:
            methods, signatures = _members(self._cls)
            for name, method in methods.items():
                if method.group and method.group not in self._resolved.groups:
                    raise ValueError(
                        f"The method {name} of {self._cls.__name__} is in the concurrency group {method.group!r}, "
                        f"which there is not; declare it: @remote(concurrency_groups={{{method.group!r}: 1}})."
                    )
            self._members = methods, signatures
        return self._members

    def packed(self) -> Packed:
        """Return the runtime environment that was given, packed at its first use."""
        if self._packed is None:
            self._packed = pack(self._resolved.runtime_env)
        return self._packed

    def __repr__(self) -> str:
        return f"ActorClass({self._cls.__name__})"


def _members(cls: type[Any]) -> tuple[dict[str, MethodDescription], dict[str, Arguments]]:
    methods, signatures = {}, {}
    for name, member in inspect.getmembers(cls, callable):
        if name == "__init__" or (name.startswith("__") and name.endswith("__") and _is_of_object(member, name)):
            continue
        if inspect.isclass(member):
            continue
        streams = inspect.isgeneratorfunction(member) or inspect.isasyncgenfunction(member)
        base = MethodDescription(returns=STREAMING, generator=True) if streams else MethodDescription()
        methods[name] = describe_method(getattr(member, METHOD_MARK, {}), base)
        bound = inspect.ismethod(member) or isinstance(inspect.getattr_static(cls, name), staticmethod)
        signatures[name] = Arguments(member, f"{cls.__name__}.{name}", bound=not bound)
    return methods, signatures


def _is_of_object(member: Any, name: str) -> bool:
    return getattr(object, name, None) == member or name in ("__class__", "__init_subclass__", "__subclasshook__")


# ------------------------------------------------------------------------------------ creating


def _create(
    actor_class: ActorClass[Any, Any], current: Runtime, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ActorHandle[Any]:
    options, cls, began_ns = actor_class._resolved, actor_class._cls, time.time_ns()
    namespace = (options.namespace or current.namespace) if options.name else ""
    if options.get_if_exists and (existing := _find(options.name, namespace, current)) is not None:
        return handle_of(existing)
    methods, signatures = actor_class.members()
    sequential, unordered = _concurrency(options, cls)
    strategy, in_group = _place(options, cls.__name__, current)
    actor, ref = current.new_actor()
    job = _open_job(current, actor) if options.detached else current.job
    arguments, dependencies, whole, holds = current.made_of(cls.__name__, args, kwargs)
    spec = ActorSpec(
        function=actor_class._export.to(current, job),
        arguments=arguments,
        dependencies=dependencies,
        whole=whole,
        concurrency=options.concurrency,
        groups=options.groups,
        in_group=in_group,
        code=actor_class._export.carried(MOST_CODE_BYTES),
    )
    handle_description = HandleDescription(
        class_name=cls.__name__,
        methods=methods,
        retries=options.max_task_retries,
        sequential=sequential,
        unordered=unordered,
        max_pending_calls=options.max_pending_calls,
        detached=options.detached,
    )
    description = ActorDescription(
        actor_id=actor,
        job_id=job,
        owner=current.local,
        owner_key=ref._state.key,
        class_name=cls.__name__,
        name=options.name,
        namespace=namespace,
        detached=options.detached,
        placement=options.placement,
        resources=options.resources,
        strategy=strategy,
        environment=environment_of(current, job, actor_class.packed()),
        priority=current.priority if options.priority is None else options.priority,
        max_restarts=options.max_restarts,
        methods=_bounded(handle_description, MOST_METHODS_BYTES, f"the methods of {cls.__name__}"),
        trace=current.trace_of_actor(cls.__name__, actor, job, began_ns),
        parent=current.submitter,
    )
    encoded = _bounded(spec, MOST_SPEC_BYTES, f"what {cls.__name__} is made of")
    return _request(current, options, description, encoded, holds, ref, handle_description, signatures)


def _concurrency(options: ActorOptions, cls: type[Any]) -> tuple[bool, bool]:
    """Return whether an actor runs one call after the other, and whether its calls need not wait for each other's
    arguments: as a rule those of async and threaded actors, for which nothing else is possible, as in Ray. With
    concurrency groups alone they keep their order, in which each group runs its own.
    """
    at_once = options.concurrency > 1 or is_async(cls)
    if at_once and options.unordered is False:
        raise ValueError(
            f"{cls.__name__} runs several calls at once (it is async, or has max_concurrency), so they keep no order: "
            "allow_out_of_order_execution cannot be False; leave it out."
        )
    sequential = not (at_once or options.groups)
    return sequential, at_once if options.unordered is None else options.unordered


def _request(
    current: Runtime,
    options: ActorOptions,
    description: ActorDescription,
    spec: bytes,
    holds: list[ObjectRef[Any]],
    ref: ObjectRef[Any],
    handle_description: HandleDescription,
    signatures: dict[str, Arguments],
) -> ActorHandle[Any]:
    """Have the actor created and return its handle, or that of the actor which has its name."""
    named = bool(options.name) or options.detached
    if named:
        record = current.create_named_actor(description, spec, holds, ref, options.get_if_exists)
        if record.description.actor_id != description.actor_id:
            return handle_of(record)
        handle = new_handle(description.actor_id, handle_description, ref)
    else:
        current.own_actor(description, ref)
        handle = new_handle(description.actor_id, handle_description, ref, new=True)
        current.create_actor(description, spec, holds)
    handle._shoal_signatures = signatures
    return handle


def _place(options: ActorOptions, name: str, current: Runtime) -> tuple[Strategy, InGroup | None]:
    """Return where an actor is to be placed, and the placement group it is then in."""
    resources, placement = to_amounts(options.resources), to_amounts(options.placement)
    placed = place(options.group, current.in_group, name, resources, placement)
    return (options.strategy, None) if placed is None else placed


def _open_job(current: Runtime, actor: Any) -> JobId:
    """Open the job that a detached actor has of its own, so that it outlives its creator's."""
    job = current.ask_gcs("open_actor_job", OpenActorJob(actor_id=actor, creator_job=current.job))
    assert isinstance(job, JobRecord)
    return job.job_id


def _bounded(struct: msgspec.Struct, most_bytes: int, what: str) -> bytes:
    data = msgspec.msgpack.encode(struct)
    if len(data) > most_bytes:
        raise ValueError(f"Too much to record: {what} has {len(data):,} bytes; at most {most_bytes:,} are kept.")
    return data


# ------------------------------------------------------------------------------------ methods


@overload
def method(function: F, /) -> F: ...


@overload
def method(**options: Any) -> Callable[[F], F]: ...


def method(*args: Any, **options: Any) -> Any:
    """Give options to a method of an actor class: ``@method(num_returns=2, concurrency_group="io")``.

    Options: ``num_returns`` (1), ``concurrency_group``, ``max_task_retries`` (the actor's), ``retry_exceptions``
    (False; True or a list of classes). An unknown one is a ``ValueError`` here.
    """
    if len(args) == 1 and not options and callable(args[0]):
        return args[0]
    if args or not options:
        raise TypeError(
            "The @method decorator must be applied using keyword arguments, for example '@method(num_returns=2)'."
        )
    actor_options.check_method(options)

    def mark(function: F) -> F:
        setattr(function, METHOD_MARK, options)
        return function

    return mark


# ------------------------------------------------------------------------------------ beside calling


def get_actor(name: str, namespace: str | None = None) -> ActorHandle[Any]:
    """Return a handle of the living actor of a name; ``namespace`` is this job's unless given.

    Raises ``ValueError`` where there is none.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"Please supply a non-empty value to get_actor, got {name!r}.")
    if namespace is not None and (not isinstance(namespace, str) or not namespace):
        raise ValueError(f"The namespace must be a str that is not empty, got {namespace!r}.")
    current = runtime()
    where = namespace or current.namespace
    record = _find(name, where, current)
    if record is None:
        raise ValueError(
            f"Failed to look up actor with name {name!r} in namespace {where!r}. It has not been created, it has died, "
            "or it is in another namespace (pass namespace=...)."
        )
    return handle_of(record)


def _find(name: str, namespace: str, current: Runtime) -> ActorRecord | None:
    with contextlib.suppress(NotFoundError):
        record = current.ask_gcs("find_actor", FindActor(name=name, namespace=namespace))
        assert isinstance(record, ActorRecord)
        return record
    return None


def kill(actor: ActorHandle[Any], *, no_restart: bool = True) -> None:
    """End an actor at once: its process is killed, calls that have not ended fail with ``ActorDiedError``.

    With ``no_restart=False`` it is started again, if its ``max_restarts`` allows.
    """
    if not isinstance(actor, ActorHandle):
        raise ValueError(f"kill() is only supported for actors. For tasks, use cancel(). Got: {actor!r}.")
    runtime().kill_actor(actor._shoal_actor, no_restart=no_restart, reason="it was killed by kill()")


@overload
def list_named_actors(all_namespaces: Literal[False] = False) -> list[str]: ...


@overload
def list_named_actors(all_namespaces: Literal[True]) -> list[dict[str, str]]: ...


def list_named_actors(all_namespaces: bool = False) -> list[str] | list[dict[str, str]]:
    """Return the names of the living actors of this namespace; with ``all_namespaces``, name and namespace of all."""
    current = runtime()
    namespace = None if all_namespaces else current.namespace
    actors = current.ask_gcs("list_actors", ListActors(named_only=True, namespace=namespace))
    assert isinstance(actors, ActorList)
    if all_namespaces:
        return [{"name": actor.name, "namespace": actor.namespace} for actor in actors.actors]
    return [actor.name for actor in actors.actors]


def exit_actor() -> NoReturn:
    """End the actor whose method calls this, in good order and for good; the call is answered by its death.

    Raises ``TypeError`` outside of actors.
    """
    if runtime().hosting is None:
        raise TypeError("exit_actor() was called outside of an actor.")
    raise ActorExit("it called exit_actor()")


__all__ = [
    "ActorClass",
    "ActorClassInheritanceException",
    "ActorHandle",
    "ActorMethod",
    "exit_actor",
    "get_actor",
    "kill",
    "list_named_actors",
    "method",
]

"""Handles of actors: what one holds to call an actor's methods, anywhere in the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from shoal import actor_options
from shoal.generators import collect_method
from shoal.options import retry_on, returns_of
from shoal.session import runtime
from shoal.signature import Arguments
from shoal_core.protocol.actors import ActorRecord
from shoal_core.protocol.ids import ActorId
from shoal_core.protocol.records import Reference
from shoal_core.runtime.ownership.identities import ActorID
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import MethodCall, Runtime
from shoal_core.runtime.tasks.pending import PendingCounter
from shoal_core.runtime.worker.hosting import SPECIAL_METHODS

CALL = "__ray_call__"
"""The method of every actor that calls the function it is given with the instance."""

T_co = TypeVar("T_co", covariant=True)


class MethodDescription(msgspec.Struct, array_like=True, frozen=True):
    """What a handle knows of a method: the options that ``@method`` gave it."""

    returns: int = 1
    retries: int | None = None
    retry_on: bytes = b""
    group: str = ""
    ahead: int = 0
    generator: bool = False
    dynamic: bool = False


class HandleDescription(msgspec.Struct, array_like=True, frozen=True):
    """What a handle knows of its actor; it never changes, and goes with the handle wherever that goes."""

    class_name: str
    methods: dict[str, MethodDescription]
    retries: int = 0
    sequential: bool = True
    unordered: bool = False
    max_pending_calls: int = -1
    detached: bool = False


class ActorHandle(Generic[T_co]):
    """A handle of an actor: ``handle.method.remote(...)`` calls a method and returns a reference at once.

    A handle may be passed to tasks and other actors, kept in data structures and returned. Calls made in one process
    run in the order in which they were made. An actor that is not detached lives as long as there is a handle of it
    and its creator lives.
    """

    def __init__(
        self,
        actor: ActorId,
        description: HandleDescription,
        ref: ObjectRef[Any],
        owner: Runtime,
        signatures: Mapping[str, Arguments] | None = None,
    ) -> None:
        self._shoal_actor = actor
        self._shoal_description = description
        self._shoal_ref = ref
        self._shoal_runtime = owner
        self._shoal_signatures = signatures or {}
        most = description.max_pending_calls
        self._shoal_counter = PendingCounter(most) if most > 0 else None
        self._shoal_calls: dict[str, MethodCall] = {}

    def __getattr__(self, name: str) -> ActorMethod:
        # Methods are bound anew each time: a handle that kept them would wait for the garbage collector to go.
        call = self.__dict__["_shoal_calls"].get(name)
        if call is None:
            call = self._shoal_calls[name] = self._shoal_call(name)
        return ActorMethod(self, name, call)

    def _shoal_call(self, name: str, options: Mapping[str, Any] | None = None) -> MethodCall:
        """Return what calls of a method share, by its own options and those given here."""
        about = self._shoal_description
        method = about.methods.get(name)
        if method is None:
            if name not in SPECIAL_METHODS:
                raise AttributeError(f"The actor class {about.class_name!r} has no method {name!r}.")
            method = MethodDescription()
        options = options or {}
        method = describe_method(options, method)
        return MethodCall(
            actor=self._shoal_actor,
            method=CALL if method.dynamic else name,
            name=options.get("name") or f"{about.class_name}.{name}",
            returns=method.returns,
            retries=about.retries if method.retries is None else method.retries,
            retry_on=method.retry_on,
            group=method.group,
            ahead=method.ahead,
            unordered=about.unordered,
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._shoal_description.methods})

    @property
    def _actor_id(self) -> ActorID:
        return ActorID(self._shoal_actor)

    _ray_actor_id = _actor_id

    def __reduce__(self) -> tuple[Any, ...]:
        ref = None if self._shoal_description.detached else self._shoal_ref
        return _restore, (self._shoal_actor, msgspec.msgpack.encode(self._shoal_description), ref)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._shoal_actor == self._shoal_actor

    def __hash__(self) -> int:
        return hash(self._shoal_actor)

    def __repr__(self) -> str:
        return f"Actor({self._shoal_description.class_name}, {self._shoal_actor})"


class ActorMethod:
    """A method of an actor, bound to a handle."""

    __slots__ = ("_call", "_handle", "_name", "_options")

    def __init__(
        self, handle: ActorHandle[Any], name: str, call: MethodCall, options: Mapping[str, Any] | None = None
    ) -> None:
        self._handle = handle
        self._name = name
        self._call = call
        self._options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ``TypeError``: methods of actors are not called directly."""
        raise TypeError(
            f"Actor methods cannot be called directly. Instead of running 'object.{self._name}()', try "
            f"'object.{self._name}.remote()'."
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method and return a reference to its result, without waiting.

        With ``num_returns=n`` a list of n references, with ``num_returns=0`` None. Raises ``TypeError`` where the
        arguments do not fit (if the class is known here) or cannot be pickled, and ``PendingCallsLimitExceeded``.
        """
        handle, call = self._handle, self._call
        if (signature := handle._shoal_signatures.get(self._name)) is not None:
            signature.check(args, kwargs)
        if call.method != self._name:
            args = (collect_method, self._name, *args)
        refs = handle._shoal_runtime.call_actor(call, handle._shoal_ref, args, kwargs, handle._shoal_counter)
        if len(refs) == 1:
            return refs[0]
        return refs or None

    def options(self, **options: Any) -> ActorMethod:
        """Return this method with some options replaced: ``num_returns``, ``concurrency_group``, ``name``, …"""
        actor_options.check_method(options)
        merged = {**(self._options or {}), **options}
        return ActorMethod(self._handle, self._name, self._handle._shoal_call(self._name, merged), merged)

    def _remote(self, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
        """Call the method with arguments and options given as values (a name that Ray programs use)."""
        target = self.options(**options) if options else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def __repr__(self) -> str:
        return f"ActorMethod({self._call.name})"


def describe_method(options: Mapping[str, Any], base: MethodDescription | None = None) -> MethodDescription:
    """Return checked options of a method as a handle keeps them, over those of ``base``."""
    base = base or MethodDescription()
    given = {name: value for name, value in options.items() if value is not None}
    dynamic = given["num_returns"] == "dynamic" if "num_returns" in given else base.dynamic
    if dynamic and not base.generator:
        raise ValueError("num_returns='dynamic' is for methods that yield; this one is no generator function.")
    return MethodDescription(
        returns=returns_of(given["num_returns"], generator=base.generator) if "num_returns" in given else base.returns,
        retries=given.get("max_task_retries", base.retries),
        retry_on=retry_on(given["retry_exceptions"]) if "retry_exceptions" in given else base.retry_on,
        group=given.get("concurrency_group", base.group),
        ahead=max(0, given.get("_generator_backpressure_num_objects", base.ahead)),
        generator=base.generator,
        dynamic=dynamic,
    )


def new_handle(
    actor: ActorId, description: HandleDescription, ref: ObjectRef[Any], *, new: bool = False, uncounted: bool = False
) -> ActorHandle[Any]:
    """Return a handle whose life is that of ``ref``, and have this process hear of the actor."""
    current = runtime()
    current.follow(actor, description.class_name, ref, sequential=description.sequential, new=new, uncounted=uncounted)
    return ActorHandle(actor, description, ref, current)


def handle_of(record: ActorRecord) -> ActorHandle[Any]:
    """Return a new handle of an actor that the control store knows."""
    current = runtime()
    about = record.description
    description = msgspec.msgpack.decode(about.methods, type=HandleDescription)
    if about.detached:
        return new_handle(about.actor_id, description, current.token())
    ref = current.objects.restore(Reference(about.owner, about.owner_key))
    return new_handle(about.actor_id, description, ref, uncounted=True)


def own_handle(record: ActorRecord) -> ActorHandle[Any]:
    """Return a handle of the actor of this process, which does not keep it alive."""
    description = msgspec.msgpack.decode(record.description.methods, type=HandleDescription)
    return new_handle(record.description.actor_id, description, runtime().token())


def _restore(actor: ActorId, description: bytes, ref: ObjectRef[Any] | None) -> ActorHandle[Any]:
    """Make a handle that was pickled; the reference in it has been counted on the way."""
    decoded = msgspec.msgpack.decode(description, type=HandleDescription)
    return new_handle(actor, decoded, runtime().token() if ref is None else ref)

"""Remote functions: what ``@remote`` makes of a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, Never, ParamSpec, TypeVar, overload

from shoal import options as option_table
from shoal.environments import Packed, environment_of, pack, travelling
from shoal.exports import Export, Known
from shoal.generators import collected
from shoal.placement import place
from shoal.session import runtime
from shoal.signature import Arguments
from shoal_core.protocol.records import InGroup
from shoal_core.protocol.resources import to_amounts
from shoal_core.runtime.data.failures import sendable
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.ownership.streams import ObjectRefGenerator
from shoal_core.runtime.runtime import Call, Runtime

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class RemoteFunction(Generic[P, R]):
    """A function whose calls run somewhere in the cluster.

    ``f.remote(...)`` returns a reference to the result at once. ``f.options(...)`` is the same function with other
    options. An argument that is itself a reference is replaced by its value before the function runs.
    """

    def __init__(self, function: Callable[P, R], options: dict[str, Any]) -> None:
        option_table.check(options)
        functools.update_wrapper(self, function)
        self._function = function
        self._options = options
        self._resolved = _resolve(function, options)
        self._exported = self._new_export()
        self._arguments = Arguments(function, _name(function))
        self._packed: Packed | None = None
        self._call: tuple[Runtime, InGroup | None, Call] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Raise ``TypeError``: remote functions are not called directly."""
        name = _name(self._function)
        raise TypeError(
            f"Remote functions cannot be called directly. Instead of running '{name}()', try '{name}.remote()'."
        )

    # What returns Any fits every case: this one comes first, so that it is not taken for a generator.
    @overload
    def remote(self: RemoteFunction[P, Never], /, *args: P.args, **kwargs: P.kwargs) -> ObjectRef[Any]: ...  # type: ignore[overload-overlap]

    @overload
    def remote(self: RemoteFunction[P, Iterator[T]], /, *args: P.args, **kwargs: P.kwargs) -> ObjectRefGenerator[T]: ...  # type: ignore[overload-overlap]

    @overload
    def remote(self, /, *args: P.args, **kwargs: P.kwargs) -> ObjectRef[R]: ...

    # A reference may stand for a value. No type can say so for every parameter; a call with a reference among its first
    # four arguments is accepted with whatever else it passes.
    @overload
    def remote(self, ref0: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ObjectRef[R]: ...

    @overload
    def remote(self, arg0: Any, ref1: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ObjectRef[R]: ...

    @overload
    def remote(self, arg0: Any, arg1: Any, ref2: ObjectRef[Any], /, *args: Any, **kwargs: Any) -> ObjectRef[R]: ...

    @overload
    def remote(
        self, arg0: Any, arg1: Any, arg2: Any, ref3: ObjectRef[Any], /, *args: Any, **kwargs: Any
    ) -> ObjectRef[R]: ...

    def remote(self, /, *args: Any, **kwargs: Any) -> Any:
        """Start the function in the cluster and return a reference to its result, without waiting.

        With ``num_returns=n`` a list of n references, with ``num_returns=0`` None. Raises ``TypeError`` at once where
        the arguments do not fit the function, and where it or an argument cannot be pickled, naming the culprit.
        """
        self._arguments.check(args, kwargs)
        call = self._call
        current = runtime()
        inside = None if self._resolved.group is None else current.in_group
        if call is None or call[0] is not current or call[1] != inside:
            call = self._call = (current, inside, self._prepare(current, inside))
        refs = current.submit(call[2], args, kwargs)
        if len(refs) == 1:
            return refs[0]
        return refs or None

    def _remote(self, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
        """Start the function with arguments and options given as values (a name that Ray programs use)."""
        target = self.options(**options) if options else self
        return target.remote(*(args or ()), **(kwargs or {}))

    def options(self, **options: Any) -> RemoteFunction[P, R]:
        """Return this function with some options replaced; those not named stay as they are."""
        option_table.check(options, in_options=True)
        changed: RemoteFunction[P, R] = RemoteFunction(self._function, {**self._options, **options})
        if changed._resolved.dynamic == self._resolved.dynamic:
            changed._exported = self._exported
        return changed

    def _new_export(self, known: Known | None = None) -> Export:
        function: Callable[..., Any] = self._function
        if self._resolved.dynamic:
            function = collected(function)
        return Export(function, self._resolved.max_calls, known)

    def _prepare(self, current: Runtime, inside: InGroup | None) -> Call:
        """Return what calls share that are made in this placement group, or (None) in none."""
        resolved = self._resolved
        scheduling_class, in_group = resolved.scheduling_class, None
        resources = to_amounts(dict(scheduling_class.resources))
        if (placed := place(resolved.group, inside, f"{resolved.name}()", resources)) is not None:
            bundle, in_group = placed
            scheduling_class = replace(scheduling_class, strategy=bundle)
        if self._packed is None:
            self._packed = pack(resolved.runtime_env)
        environment = environment_of(current, current.job, self._packed)
        return Call(
            function=self._exported.to(current, current.job),
            name=resolved.name,
            returns=resolved.returns,
            key=current.scheduling_key(replace(scheduling_class, environment=environment)),
            retries=resolved.retries,
            retry_on=resolved.retry_on,
            ahead=resolved.ahead,
            in_group=in_group,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # In two steps, so that a function may refer to itself: the object exists before its parts are pickled.
        state = (self._function, travelling(self._options), self._exported.known)
        return object.__new__, (RemoteFunction,), state

    def __setstate__(self, state: tuple[Callable[P, R], dict[str, Any], Known | None]) -> None:
        function, options, known = state
        self._function = function
        self._options = options
        self._resolved = _resolve(function, options)
        self._exported = self._new_export(known)
        self._arguments = Arguments(function, _name(function))
        self._packed = None
        self._call = None
        functools.update_wrapper(self, function)


def _resolve(function: Callable[..., Any], options: dict[str, Any]) -> option_table.TaskOptions:
    return option_table.resolve(options, _name(function), generator=inspect.isgeneratorfunction(function))


def _name(function: Callable[..., Any]) -> str:
    return sendable(getattr(function, "__name__", repr(function)))

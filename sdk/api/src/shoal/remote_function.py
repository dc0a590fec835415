"""Remote functions: what ``@remote`` makes of a function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, overload

from shoal import options as option_table
from shoal.session import runtime
from shoal_core.protocol.ids import FunctionId
from shoal_core.runtime.functions import Definition, Exported, export
from shoal_core.runtime.objects import ObjectRef
from shoal_core.runtime.runtime import Call, Runtime

P = ParamSpec("P")
R = TypeVar("R")


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
        self._resolved = option_table.resolve(options, _name(function))
        self._exported: _Export[P, R] = _Export(function, self._resolved.max_calls)
        self._call: tuple[Runtime, Call] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Raise ``TypeError``: remote functions are not called directly."""
        name = _name(self._function)
        raise TypeError(
            f"Remote functions cannot be called directly. Instead of running '{name}()', try '{name}.remote()'."
        )

    @overload
    def remote(self, *args: P.args, **kwargs: P.kwargs) -> ObjectRef[R]: ...

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

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Start the function in the cluster and return a reference to its result, without waiting.

        With ``num_returns=n`` a list of n references, with ``num_returns=0`` None. Raises ``TypeError`` at once when
        the function or an argument cannot be pickled, naming the culprit.
        """
        call = self._call
        current = runtime()
        if call is None or call[0] is not current:
            call = self._call = (current, self._prepare(current))
        refs = current.submit(call[1], args, kwargs)
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
        changed._exported = self._exported
        return changed

    def _prepare(self, current: Runtime) -> Call:
        exported = self._exported.data()
        if exported.data:
            current.export(exported)
        resolved = self._resolved
        return Call(
            function=exported.function_id,
            name=resolved.name,
            returns=resolved.returns,
            key=current.scheduling_key(resolved.scheduling_class),
            retries=resolved.retries,
            retry_on=resolved.retry_on,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # In two steps, so that a function may refer to itself: the object exists before its parts are pickled.
        state = (self._function, self._options, self._exported.function_id())
        return object.__new__, (RemoteFunction,), state

    def __setstate__(self, state: tuple[Callable[P, R], dict[str, Any], FunctionId | None]) -> None:
        function, options, function_id = state
        self._function = function
        self._options = options
        self._resolved = option_table.resolve(options, _name(function))
        self._exported = _Export(function, self._resolved.max_calls, function_id)
        self._call = None
        functools.update_wrapper(self, function)


class _Export(Generic[P, R]):
    """The pickle of a function, made at the first call, so that what it refers to may be defined after it.

    A function that was exported before it was itself sent here keeps its id and is not pickled again.
    """

    def __init__(self, function: Callable[P, R], max_calls: int, known: FunctionId | None = None) -> None:
        self._definition = Definition(function, max_calls)
        self._exported = None if known is None else Exported(known, b"")

    def function_id(self) -> FunctionId | None:
        """Return the function's id, if it has been exported."""
        return None if self._exported is None else self._exported.function_id

    def data(self) -> Exported:
        """Return the pickle; ``TypeError`` names what cannot be pickled."""
        if self._exported is None:
            self._exported = export(self._definition)
        return self._exported


@overload
def remote(function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload
def remote(**options: Any) -> Callable[[Callable[P, R]], RemoteFunction[P, R]]: ...


def remote(*args: Any, **options: Any) -> Any:
    """Make a function remote: ``@remote``, ``@remote(num_cpus=2, ...)`` or ``remote(function)``.

    Options: ``num_cpus`` (1), ``num_gpus``, ``memory`` (bytes), ``resources`` ({name: amount}), ``accelerator_type``,
    ``name``, ``num_returns`` (1), ``max_retries`` (3; -1 without end) for crashes of the worker, ``retry_exceptions``
    (False; True or a list of classes) for exceptions, ``max_calls`` (0: a worker process runs any number),
    ``scheduling_strategy``.
    """
    if len(args) == 1 and not options:
        return _make(args[0], {})
    if args or not options:
        raise TypeError(
            "The @remote decorator must be applied either with no arguments and no parentheses, for example '@remote', "
            "or with keyword arguments alone, for example '@remote(num_returns=2, resources={\"GPU_type\": 1})'."
        )
    option_table.check(options)
    return functools.partial(_make, options=options)


def _make(function: Any, options: dict[str, Any]) -> RemoteFunction[..., Any]:
    if isinstance(function, RemoteFunction):
        raise TypeError("The function is remote already; use .options(...) to change its options.")
    if inspect.isclass(function):
        raise TypeError(f"Remote classes (actors) are not supported in this version: {function.__qualname__}.")
    if not callable(function) or not hasattr(function, "__name__"):
        raise TypeError(f"The @remote decorator must be applied to a function, got {function!r}.")
    if inspect.iscoroutinefunction(function):
        raise ValueError(
            "'async def' functions cannot be remote tasks; wrap the coroutine: asyncio.run(...) in a function."
        )
    return RemoteFunction(function, options)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))

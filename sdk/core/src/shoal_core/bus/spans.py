"""Spans, by OpenTelemetry's API: imported only where tracing is on (see ``tracing``).

Whose provider it is makes no difference here: the one that ``shoal_core.telemetry`` sets up, or the user's own. Where
it is ours, whether a trace that begins here is recorded is decided before any span is made, since most are not:
``sampling`` is there then.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from random import getrandbits, random
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry import context as contexts
from opentelemetry import trace as api
from opentelemetry.context import Context, get_current
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from shoal_core import __version__
from shoal_core.protocol.errors import TaskError
from shoal_core.protocol.ids import ProcessId, TaskNumber, task_id_bytes
from shoal_core.protocol.traces import ID_LIMIT, UNRECORDED, Attributes, is_recorded, parse, trace_named

if TYPE_CHECKING:
    from shoal_core.recorder import Recorder

MOST_TEXT_CHARACTERS = 1_000
MOST_TRACEBACK_CHARACTERS = 10_000


class OfTask(NamedTuple):
    """What there is to say of a span of a task: what ``say`` makes of its id and of what many have in ``common``."""

    say: Callable[..., Attributes]
    number: TaskNumber
    owner: ProcessId
    common: tuple[Hashable, ...]

    def task_id(self) -> str:
        """Return the id of the task."""
        return task_id_bytes(self.owner, self.number).hex()

    def __call__(self) -> Attributes:
        """Say it."""
        return self.say(self.task_id(), *self.common)


class OfMany(NamedTuple):
    """What there is to say of many spans, word for word: what ``say`` makes of what they have in ``common``."""

    say: Callable[..., Attributes]
    common: tuple[Hashable, ...]

    def __call__(self) -> Attributes:
        """Say it."""
        return self.say(*self.common)


NOTHING_TO_SAY = OfMany(dict, ())
About = Attributes | Callable[[], Attributes] | OfTask | OfMany
"""What there is to say of a span; what takes time to find out, whenever it is needed."""


def _look_up() -> Callable[[], Context]:
    """Return what returns the context that is open here: what ``get_current`` does, past two calls of it if we can."""
    variable = getattr(getattr(contexts, "_RUNTIME_CONTEXT", None), "_current_context", None)
    return variable.get if isinstance(variable, ContextVar) else get_current


open_context = _look_up()
tracer = api.get_tracer("shoal", __version__)
NOT_RECORDED = SpanContext(1, 1, is_remote=True, trace_flags=TraceFlags(0))
UNRECORDED_SPAN = NonRecordingSpan(NOT_RECORDED)
UNRECORDED_CONTEXT = api.set_span_in_context(UNRECORDED_SPAN, Context())
"""In here nothing is recorded, by the rule that a span is recorded if its parent is. The ids mean nothing."""


class RootSampling:
    """Decides whether a trace that begins in this process is recorded, and chooses its id; our provider takes it.

    A trace is recorded if the lower half of its id lies below ``bound``. So in that share of all cases it is, and gets
    an id of that kind: drawing the id of every trace that is not recorded would cost more than all the rest.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self.share = bound / ID_LIMIT
        self._of_thread = threading.local()

    def draw(self) -> int:
        """Return an id for a trace that it was decided to record."""
        return getrandbits(64) * ID_LIMIT + getrandbits(64) * self._bound // ID_LIMIT

    def choose(self) -> None:
        """Choose the id of a trace that begins now in this thread, and that it was decided to record."""
        self._of_thread.chosen = self.draw()

    def take(self) -> int:
        """Return the id that was chosen in this thread for the trace that begins now; 0 where none was."""
        chosen: int = getattr(self._of_thread, "chosen", 0)
        self._of_thread.chosen = 0
        return chosen


sampling: RootSampling | None = None
recorder: Recorder | None = None
"""What makes our own spans, where the SDK's way would make no difference but cost more."""


def is_open() -> bool | None:
    """Tell whether the span that is open here is recorded; None where none is open."""
    return _is_recorded_in(context) if (context := open_context()) else None


def _is_recorded_in(context: Context) -> bool | None:
    if context is UNRECORDED_CONTEXT:
        return False
    span = api.get_current_span(context)
    return None if span is api.INVALID_SPAN else bool(span.get_span_context().trace_flags & TraceFlags.SAMPLED)


def is_wanted() -> bool:
    """Tell whether what begins here now is to be recorded: as what is open here, else as the sampling decides.

    This is all that ``.remote()`` pays for what is not recorded. So what is usual comes first: nothing is open.
    """
    context = open_context()
    if context and (recorded := _is_recorded_in(context)) is not None:
        return recorded
    return sampling is None or random() < sampling.share


def record_wanted(name: str, about: About, began_ns: int) -> str:
    """Record what a producer did until now, which ``is_wanted``; return the trace of what hangs below it."""
    if sampling is not None and is_open() is None:
        if recorder is not None:
            return recorder.root(sampling.draw(), name, "PRODUCER", about, began_ns)
        sampling.choose()
    return trace_below(record(name, "PRODUCER", None, about, began_ns).get_span_context())


def trace_below(context: SpanContext) -> str:
    """Return the trace of what hangs below a span."""
    if not context.trace_flags & TraceFlags.SAMPLED or not context.is_valid:
        return UNRECORDED
    state = context.trace_state.to_header() if context.trace_state else ""
    return trace_named(context.trace_id, context.span_id, context.trace_flags, state)


def current_trace() -> str:
    """Return the trace of what happens here now: "" where no span is open."""
    span = api.get_current_span()
    return "" if span is api.INVALID_SPAN else trace_below(span.get_span_context())


@lru_cache(maxsize=1_000)
def span_context(trace: str) -> SpanContext | None:
    """Return the span that a trace names as OpenTelemetry has it; None where it is not recorded."""
    parent = parse(trace)
    if parent is None:
        return None
    state = TraceState.from_header([parent.state]) if parent.state else None
    return SpanContext(parent.trace_id, parent.span_id, True, TraceFlags(parent.flags), state)


class NamedSpan(NonRecordingSpan):
    """The span that a trace names, which is read once somebody asks."""

    def __init__(self, trace: str) -> None:
        self._trace = trace
        self._named: SpanContext | None = None

    def get_span_context(self) -> SpanContext:
        """Return how the span is named; what cannot be read is not recorded."""
        if self._named is None:
            self._named = span_context(self._trace) or NOT_RECORDED
        return self._named


def named(trace: str) -> Span:
    """Return the span that a trace names, for what hangs below it."""
    return NamedSpan(trace) if is_recorded(trace) else UNRECORDED_SPAN


def links_of(traces: Sequence[str]) -> list[Link]:
    """Return links to the spans that traces name, as far as they are recorded."""
    return [Link(context) for trace in traces if (context := span_context(trace)) is not None]


def begin(
    name: str,
    kind: str,
    above: Span | None,
    about: About,
    began_ns: int | None = None,
    links: Sequence[str] = (),
) -> Span:
    """Begin a span, which whoever asks has to end; ``above`` None: below the one that is open here."""
    if recorder is not None:
        above = api.get_current_span() if above is None else above
        return recorder.begin(name, kind, above, about, began_ns or time.time_ns(), links)
    context = None if above is None else api.set_span_in_context(above, Context())
    return tracer.start_span(name, context, SpanKind[kind], all_said(kind, about), links_of(links), began_ns)


def all_said(kind: str, about: About) -> Attributes:
    """Return what there is to say of a span of a kind, now."""
    attributes = about() if callable(about) else about
    return attributes if kind == "INTERNAL" else {"messaging.system": "nats", **attributes}


@contextmanager
def opened(
    name: str, kind: str, trace: str, about: About, began_ns: int | None = None, links: Sequence[str] = ()
) -> Iterator[Span]:
    """Open a span below the one that a trace names ("": the one that is open here); an error that leaves is noted."""
    span = begin(name, kind, named(trace) if trace else None, about, began_ns, links)
    try:
        with api.use_span(span, record_exception=False, set_status_on_exception=False):
            yield span
    except BaseException as error:
        fail(span, error)
        raise
    finally:
        span.end()


def record(
    name: str,
    kind: str,
    above: Span | None,
    about: About,
    began_ns: int,
    failure: tuple[str, str] | None = None,
    links: Sequence[str] = (),
) -> Span:
    """Record a span that ends now; ``failure`` is its ``error.type`` and what is said of it."""
    span = begin(name, kind, above, about, began_ns, links)
    if failure is not None:
        fail_with(span, *failure)
    span.end()
    return span


def fail(span: Span, error: BaseException) -> None:
    """Note that an exception left what a span stands for."""
    kind, text = error_type(error), said(error)
    trace = "".join(traceback.format_exception(error))[-MOST_TRACEBACK_CHARACTERS:]
    span.add_event("exception", {"exception.type": kind, "exception.message": text, "exception.stacktrace": trace})
    fail_with(span, kind, text)


def fail_with(span: Span, error_type: str, text: str) -> None:
    """Note that what a span stands for has failed."""
    span.set_attribute("error.type", error_type)
    span.set_status(Status(StatusCode.ERROR, text[:MOST_TEXT_CHARACTERS]))


def error_type(error: BaseException) -> str:
    """Return the name of an exception's class, as ``error.type`` has it; of the error of a task, that of its cause."""
    return class_name(type(error.cause if isinstance(error, TaskError) else error))


def class_name(kind: type) -> str:
    """Return the name of a class as OpenTelemetry has it."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def said(error: BaseException) -> str:
    """Return what an exception says, which user code may have its own ideas of."""
    try:
        return str(error)[:MOST_TEXT_CHARACTERS]
    except Exception as worse:
        return f"<str() raised {type(worse).__name__}>"

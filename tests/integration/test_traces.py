"""Traces of a real cluster, as a collector gets them: whole trees, across the driver, the services and the workers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.otlp import ReceivedSpan, Receiver, receiving

PROGRAM = Path(__file__).with_name("traced_program.py")
CLIENT, PRODUCER, CONSUMER = 3, 4, 5


@dataclass(frozen=True)
class Tree:
    """The spans of one trace."""

    root: ReceivedSpan
    spans: list[ReceivedSpan]

    def one(self, name: str) -> ReceivedSpan:
        """Return the one span of this name."""
        [span] = [span for span in self.spans if span.name == name]
        return span

    def below(self, parent: ReceivedSpan) -> list[str]:
        """Return the names of the spans right below one, in the order in which they began."""
        children = [span for span in self.spans if span.parent_id == parent.span_id]
        return [span.name for span in sorted(children, key=lambda span: span.began_ns)]


@dataclass(frozen=True)
class Traced:
    """All that the program had recorded, and the headers it was sent with."""

    spans: list[ReceivedSpan]
    headers: dict[str, str]

    def tree(self, root: str) -> Tree:
        """Return the trace that begins with the span of this name."""
        [first] = [span for span in self.spans if span.name == root and not span.parent_id]
        return Tree(first, [span for span in self.spans if span.trace_id == first.trace_id])


PROCESSED = {
    "total": 1,
    "outer": 1,
    "inner": 3,
    "failing": 1,
    "items": 1,
    "Counter.__init__": 1,
    "Asker.__init__": 1,
    "Asker.ask": 1,
    "Counter.add": 1,
    "crashing": 1,
}
"""How often the program has what run, but for what ended with its process."""


def all_workers_sent(spans: list[ReceivedSpan]) -> bool:
    """Tell whether the last span of every run of the program has come."""
    names = Counter(span.name for span in spans)
    return all(names[f"process {name}"] >= count for name, count in PROCESSED.items())


@contextmanager
def running(receiver: Receiver, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the program, with its spans sent to the receiver, and have it leave its cluster at the end of the block."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    own = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, str(PROGRAM), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=inherited | own) as process:
        try:
            yield process
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 0, errors.decode()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """Have the program run once, with everything recorded."""
    path = tmp_path_factory.mktemp("crash") / "once"
    with receiving() as receiver:
        with running(
            receiver,
            str(path),
            OTEL_EXPORTER_OTLP_HEADERS="authorization=secret",
            OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=test",
        ) as process:
            receiver.wait_for(lambda spans: all_workers_sent(spans) or process.poll() is not None)
        yield Traced(list(receiver.spans), receiver.headers)


def test_a_task_with_a_large_argument_is_one_trace_from_its_submission_to_get(traced: Traced) -> None:
    tree = traced.tree("submit total")
    submit = tree.root
    assert sorted(tree.below(submit)) == ["get", "process total", "queue total", "schedule total"]
    assert tree.below(tree.one("process total")) == ["fetch arguments", "run total", "store result"]
    assert tree.below(tree.one("fetch arguments")) == ["process get_function"], "a large segment is mapped unasked"
    assert "process allocate" in tree.below(tree.one("store result")), "the node is asked for one for the result"
    assert tree.below(tree.one("run total")) == ["adding"], "the user's span"
    assert tree.below(tree.one("schedule total")) == ["process lease"], "by the node"
    assert tree.one("get").ended_ns >= tree.one("store result").ended_ns >= submit.ended_ns
    assert submit.attributes["messaging.message.body.size"] > 2_000_000
    assert submit.attributes["messaging.message.id"] == tree.one("process total").attributes["faas.invocation_id"]


def test_who_made_a_span_and_of_what_kind_it_is(traced: Traced) -> None:
    tree = traced.tree("submit total")
    made = {span.name: span.resource["service.name"] for span in tree.spans}
    assert made["submit total"] == made["queue total"] == made["get"] == "shoal-driver"
    assert made["schedule total"] == made["process lease"] == "shoal-host"
    assert made["process total"] == made["run total"] == made["adding"] == "shoal-process"
    kinds = {span.name: span.kind for span in tree.spans}
    assert kinds["submit total"] == PRODUCER
    assert kinds["process total"] == kinds["process lease"] == CONSUMER
    assert kinds["get"] == CLIENT
    assert {span.resource["deployment.environment.name"] for span in traced.spans} == {"test"}
    assert traced.headers["authorization"] == "secret"
    process = tree.one("process total").resource
    assert process["service.instance.id"] == process["faas.instance"]
    assert process["service.instance.id"].startswith(process["shoal.node.id"])


def test_a_failing_task_says_so_where_it_failed(traced: Traced) -> None:
    tree = traced.tree("failure")
    failed = {span.name: span.attributes["error.type"] for span in tree.spans if span.failed}
    assert failed == dict.fromkeys(("process failing", "run failing", "get"), "KeyError")
    assert tree.one("run failing").events == ("exception",)
    assert tree.below(tree.one("process failing")) == ["fetch arguments", "run failing"], "there is nothing to store"


def test_tasks_of_a_task_hang_below_its_run(traced: Traced) -> None:
    tree = traced.tree("nesting")
    nested = [name for name in tree.below(tree.one("run outer")) if not name.startswith("process ")]
    assert nested == ["submit inner", "submit inner", "get"]
    submits = [span for span in tree.spans if span.name == "submit inner"]
    assert all({"queue inner", "process inner"} <= set(tree.below(submit)) for submit in submits)
    [get] = [span for span in tree.spans if span.name == "get" and span.parent_id == tree.one("run outer").span_id]
    assert sorted(get.links) == sorted(submit.span_id for submit in submits)


def test_the_items_of_a_generator_are_stored_one_by_one(traced: Traced) -> None:
    tree = traced.tree("stream")
    process = tree.one("process items")
    assert tree.below(process) == ["fetch arguments", "run items", "store item", "store item", "store item"]
    assert process.attributes["shoal.items"] == 3
    assert tree.below(tree.one("run items")) == ["making"] * 3, "the user's spans, whenever the generator runs"
    assert [name for name in tree.below(tree.root) if name == "get"] == ["get"] * 3


def test_actors_are_made_and_called_in_the_trace(traced: Traced) -> None:
    tree = traced.tree("actors")
    create = tree.below(tree.one("create Counter"))
    assert sorted(create) == ["process Counter.__init__", "process create_actor", "schedule Counter"]
    assert tree.below(tree.one("run Counter.__init__")) == ["setting up"]
    ask = tree.one("process Asker.ask")
    assert tree.below(ask) == ["fetch arguments", "run Asker.ask", "store result"]
    assert tree.below(tree.one("run Asker.ask")) == ["asking"]
    assert tree.below(tree.one("asking")) == ["submit Counter.add", "get"], "what an async method awaits, too"
    add = tree.one("submit Counter.add")
    assert tree.below(add) == ["queue Counter.add", "process Counter.add"]
    assert tree.one("process Counter.add").attributes["shoal.actor.id"] != ask.attributes["shoal.actor.id"]


def test_the_owner_tells_of_an_attempt_whose_process_died(traced: Traced) -> None:
    tree = traced.tree("crash")
    attempts: dict[str, list[int]] = {name: [] for name in ("queue crashing", "lost crashing", "process crashing")}
    for span in tree.spans:
        if span.name in attempts:
            attempts[span.name].append(span.attributes["shoal.task.attempt"])
    assert attempts == {"queue crashing": [0, 1], "lost crashing": [0], "process crashing": [1]}
    assert tree.one("lost crashing").attributes["error.type"] == "worker_crashed"


def test_wait_and_put_are_there(traced: Traced) -> None:
    tree = traced.tree("wait and put")
    assert [name for name in tree.below(tree.root) if name in ("put", "wait")] == ["put", "wait"]


def test_every_span_but_those_of_a_process_that_died_has_its_parent(traced: Traced) -> None:
    known = {span.span_id for span in traced.spans}
    orphans = [span for span in traced.spans if span.parent_id and span.parent_id not in known]
    crash = traced.tree("crash").root.trace_id
    assert {span.trace_id for span in orphans} <= {crash}


def test_the_guide_names_every_span_that_there_is(traced: Traced) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    rows = re.findall(r"^\| (`[^|]+) \| (?:producer|internal|consumer|client) \|", guide, re.MULTILINE)
    documented = {name.split()[0] for row in rows for name in re.findall(r"`([^`]+)`", row)}
    own = [span for span in traced.spans if span.scope == "shoal"]
    assert documented == {span.name.split()[0] for span in own}
    attributes = {name for span in own for name in span.attributes if name.startswith("shoal.")}
    assert [name for name in sorted(attributes) if f"`{name}`" not in guide] == []


def test_while_it_is_off_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, shoal, shoal.host, shoal.util.state, shoal_worker.workers.template\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    off = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "SHOAL_"))}
    done = subprocess.run([sys.executable, "-c", code], env=off, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_not_sampled_is_recorded_nowhere() -> None:
    with receiving() as receiver:
        with running(receiver, OTEL_TRACES_SAMPLER="always_off"):
            pass
        assert receiver.spans == []

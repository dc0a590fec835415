"""The tables of verbs, and the messages they name."""

from __future__ import annotations

import inspect

import pytest

from shoal_core.protocol import actors, groups, logs, messages, verbs
from shoal_core.protocol.messages import Message, Refusal
from shoal_core.protocol.verbs import (
    GCS_CHANGING,
    GCS_NODE,
    GCS_READING,
    GCS_SCHEDULER,
    NODE_NODE,
    NODE_PROCESS,
    NODE_PUBLIC,
    NODE_SCHEDULER,
    OBJECTSTORE,
    REPLIES,
    SCHEDULER_PUBLIC,
)

TABLES = [
    GCS_READING,
    GCS_CHANGING,
    GCS_NODE,
    GCS_SCHEDULER,
    SCHEDULER_PUBLIC,
    NODE_PUBLIC,
    NODE_SCHEDULER,
    NODE_PROCESS,
    NODE_NODE,
    OBJECTSTORE,
]
ALL = sorted(
    {
        model
        for module in (messages, actors, groups, logs)
        for model in vars(module).values()
        if inspect.isclass(model) and issubclass(model, Message) and model is not Message
    },
    key=lambda model: model.__name__,
)


def test_every_request_in_a_table_has_an_answer() -> None:
    asked = {model for table in TABLES for model in table.values()}
    assert asked == set(REPLIES)


def test_every_table_of_verbs_is_looked_at_here() -> None:
    tables = [value for value in vars(verbs).values() if isinstance(value, dict) and value is not REPLIES]
    tables = [table for table in tables if table and all(isinstance(verb, str) for verb in table)]
    named = [table for table in tables if all(inspect.isclass(model) for model in table.values())]
    assert sorted(map(sorted, named)) == sorted(map(sorted, TABLES))


def test_a_request_has_one_verb() -> None:
    asked = [model for table in TABLES for model in table.values()]
    assert len(asked) == len(set(asked))


def test_a_verb_is_one_token_of_a_subject() -> None:
    assert all(verb.replace("_", "").isalpha() and verb.islower() for table in TABLES for verb in table)


@pytest.mark.parametrize("model", ALL, ids=lambda model: model.__name__)
def test_a_message_is_frozen_refuses_unknown_fields_and_says_what_it_means(model: type[Message]) -> None:
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"
    assert model.__doc__


def test_no_message_can_be_taken_for_a_refusal() -> None:
    first_fields = {model: next(iter(model.model_fields), "") for model in ALL}
    assert [model for model, name in first_fields.items() if name == "code"] == [Refusal]

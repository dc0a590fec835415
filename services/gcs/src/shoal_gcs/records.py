"""What the control store keeps, and under which keys.

=========================================  ============================  ============================================
key                                        bucket                        value
=========================================  ============================  ============================================
``cluster``                                control                       the session, drawn once
``node.<node id>``                         control                       ``StoredNode`` as JSON; never deleted
``job.<job id>``                           control                       ``StoredJob`` as JSON; never deleted
``kv.<namespace>.<key>``                   control                       ``StoredKey``; a deleted one stays as such
``actor.<actor id>``                       control                       ``ActorRecord`` as JSON
``name.<namespace>.<name>``                control                       the id of the actor that has the name
``group.<group id>``                       control                       ``GroupRecord`` as JSON
``groupname.<namespace>.<name>``           control                       the id of the placement group that has the name
``spec.<actor id>.0``                      functions                     what the actor's process makes it from
``function.<job>.<function>.<part>``       functions (watched by none)   how many parts, a newline, the part's bytes
=========================================  ============================  ============================================

A user's namespace and key are one encoded token each, so that no name can reach into another. Ids come from outside
too: what is none is refused here, before it becomes a key.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass

from shoal_core.protocol.errors import InvalidRequestError
from shoal_core.protocol.ids import ActorId, FunctionId, JobId, NodeId, PlacementGroupId
from shoal_core.protocol.messages import JobRecord, Message, NodeRecord

CLUSTER_KEY = "cluster"
ACTOR_PREFIX = "actor."
GROUP_PREFIX = "group."
CONTROL, FUNCTIONS = "", "functions"
PART_BYTES = 512 * 1024
NAME_BYTES = 512
LIST_BYTES = 768 * 1024
"""How much of a list fits into one answer: who lives, and the newest of those who ended."""
MOST_WRITERS = 8
ID = re.compile(r"[-_a-zA-Z0-9]{1,64}")


class StoredNode(Message):
    """A node's record; ``told`` is set once its death was published."""

    record: NodeRecord
    told: bool = False


class StoredJob(Message):
    """A job's record; ``told`` is set once its end was published and its functions are gone."""

    record: JobRecord
    told: bool = False


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What a key of the internal key-value store holds: ``value`` None where it was deleted.

    ``writers`` name the requests that changed it last, newest first, at most ``MOST_WRITERS``. A request whose write
    seems to have come too late can so tell that it took effect and was written over before the answer was known.
    """

    writers: tuple[str, ...] = ()
    value: bytes | None = None

    def changed(self, writer: str, value: bytes | None) -> StoredKey:
        """Return what a request makes of it."""
        return StoredKey((writer, *self.writers)[:MOST_WRITERS], value)

    def encode(self) -> bytes:
        """Return it as the store keeps it: a line with what was done and by whom, then the value."""
        return join(" ".join(("deleted" if self.value is None else "put", *self.writers)), self.value or b"")

    @staticmethod
    def decode(stored: bytes | None) -> StoredKey:
        """Return what ``encode`` encoded; of a key that the store never held, that nobody wrote it."""
        if stored is None:
            return StoredKey()
        head, value = split(stored)
        done, *writers = head.split(" ")
        return StoredKey(tuple(writers), None if done == "deleted" else value)


def node_key(node: NodeId) -> str:
    """Return where a node's record is kept."""
    return f"node.{_checked('node', node)}"


def job_key(job: JobId) -> str:
    """Return where a job's record is kept."""
    return f"job.{_checked('job', job)}"


def job_id(number: int) -> JobId:
    """Return the id of the ``number``-th job, from 1."""
    return JobId(f"{number:08x}")


def kv_key(namespace: str, key: str) -> str:
    """Return where a key of the internal key-value store is kept."""
    return f"kv.{_token(namespace)}.{_token(key)}"


def parse_kv_key(key: str) -> tuple[str, str]:
    """Return the namespace and the key that ``kv_key`` encoded."""
    _, namespace, name = key.split(".")
    return _text(namespace), _text(name)


def actor_key(actor: ActorId) -> str:
    """Return where an actor's record is kept."""
    return f"{ACTOR_PREFIX}{_checked('actor', actor)}"


def name_key(namespace: str, name: str) -> str:
    """Return where it is kept which actor has a name."""
    return f"name.{_token(namespace)}.{_token(name)}"


def group_key(group: PlacementGroupId) -> str:
    """Return where a placement group's record is kept."""
    return f"{GROUP_PREFIX}{_checked('placement group', group)}"


def group_name_key(namespace: str, name: str) -> str:
    """Return where it is kept which placement group has a name."""
    return f"groupname.{_token(namespace)}.{_token(name)}"


def spec_key(actor: ActorId) -> str:
    """Return where it is kept what an actor is made from."""
    return f"{spec_prefix(actor)}0"


def spec_prefix(actor: ActorId) -> str:
    """Return what the one key of that begins with."""
    return f"spec.{_checked('actor', actor)}."


def function_prefix(job: JobId) -> str:
    """Return what the keys of all functions of a job begin with."""
    return f"function.{_checked('job', job)}."


def function_key(job: JobId, function: FunctionId, part: int) -> str:
    """Return where one part of a function is kept."""
    return f"{function_prefix(job)}{_checked('function', function)}.{part}"


def join(head: str, data: bytes) -> bytes:
    """Return bytes with a line in front of them."""
    return head.encode() + b"\n" + data


def split(value: bytes) -> tuple[str, bytes]:
    """Return what ``join`` joined."""
    head, _, data = value.partition(b"\n")
    return head.decode(), data


def _checked(what: str, identity: str) -> str:
    """Return an id, which may become a token of a key; raises ``InvalidRequestError`` for what is none."""
    if ID.fullmatch(identity) is None:
        raise InvalidRequestError(f"not the id of a {what}: {identity[:80]!r} (1 to 64 letters, digits and - _)")
    return identity


def _token(text: str) -> str:
    """Return any text as one token of a key."""
    return urlsafe_b64encode(text.encode()).decode().rstrip("=") or "="


def _text(token: str) -> str:
    """Return the text that ``_token`` encoded."""
    return "" if token == "=" else urlsafe_b64decode(token + "=" * (-len(token) % 4)).decode()

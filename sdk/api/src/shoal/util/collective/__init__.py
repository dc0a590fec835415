"""Collective operations among tasks and actors, under the names of Ray's: on NumPy arrays and CPU tensors of PyTorch.

A group is named, has a number of ranks, and each rank is a process: it joins by ``init_collective_group``, or whoever
made the actors declares them all by ``create_collective_group``, and each joins with its first operation. All ranks
call the same operations in the same order. Results are written into the tensors that are given.

Values travel by the object store, once to each node (see ``hub``): right for gradients and parameters of CPU programs,
and for handing data around. There is no NCCL here: tensors of GPUs are refused, and so is its name. Within frameworks
that bring collectives of their own, such as ``torch.distributed``, use those.

An operation for which ranks are missing raises ``TimeoutError`` that names them, after ``gloo_timeout`` milliseconds.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy

from shoal.actor import ActorClass, get_actor, kill
from shoal.exceptions import ActorError
from shoal.handle import ActorHandle
from shoal.objects import get, put
from shoal.runtime_context import get_runtime_context
from shoal.util.collective import types
from shoal.util.collective.hub import Given, Hub, Operation
from shoal.util.collective.types import Backend, ReduceOp

__all__ = [
    "Backend",
    "ReduceOp",
    "allgather",
    "allreduce",
    "barrier",
    "broadcast",
    "create_collective_group",
    "destroy_collective_group",
    "get_collective_group_size",
    "get_rank",
    "init_collective_group",
    "is_group_initialized",
    "recv",
    "reduce",
    "reducescatter",
    "send",
    "types",
]

TIMEOUT_MILLISECONDS = 30_000
SPARE_SECONDS = 30.0
"""How much longer than the hub a rank waits for the hub's answer."""
MOST_RANKS = 100_000
MOST_ATTEMPTS = 10
PAUSE_SECONDS = 0.1


class _Group:
    """This process's part in a group."""

    def __init__(self, hub: ActorHandle[Hub], rank: int, size: int, seconds: float) -> None:
        self.hub = hub
        self.rank = rank
        self.size = size
        self._seconds = seconds + SPARE_SECONDS
        self._numbers = itertools.count()
        self._between: Counter[tuple[int, int]] = Counter()

    def meet(self, operation: Operation, tensors: Sequence[Any]) -> list[Any]:
        """Bring tensors to an operation of all ranks, and return what comes of it."""
        refs = [put(array) for array in tensors]
        taken: Given = get(self.hub.meet.remote(next(self._numbers), self.rank, operation, refs), timeout=self._seconds)
        return get(taken)

    def send(self, array: Any, receiver: int) -> None:
        """Hand a tensor to another rank."""
        number = self._number(self.rank, receiver)
        get(self.hub.send.remote(number, self.rank, receiver, [put(array)]), timeout=self._seconds)

    def receive(self, sender: int) -> Any:
        """Take what another rank sends."""
        number = self._number(sender, self.rank)
        (ref,) = get(self.hub.receive.remote(number, sender, self.rank), timeout=self._seconds)
        return get(ref)

    def _number(self, sender: int, receiver: int) -> int:
        self._between[sender, receiver] += 1
        return self._between[sender, receiver]


_groups: dict[str, _Group] = {}
_declared: dict[str, ActorHandle[Hub]] = {}
_lock = threading.RLock()


# ------------------------------------------------------------------------------------ groups


def init_collective_group(
    world_size: int,
    rank: int,
    backend: str = Backend.NCCL,
    group_name: str = "default",
    gloo_timeout: int = TIMEOUT_MILLISECONDS,
) -> None:
    """Join a group of ``world_size`` ranks as one of them, within a task or an actor.

    ``backend`` must be "gloo". ``gloo_timeout`` is in milliseconds; that of the rank that comes first counts. Raises
    ``ValueError`` for wrong arguments, ``RuntimeError`` outside of tasks and actors, where this process is in the group
    already, and where another has the rank.
    """
    _check_backend(backend)
    _check_name(group_name)
    _check_ranks(world_size, [rank])
    with _lock:
        if group_name in _groups:
            raise RuntimeError(f"This process is in the collective group {group_name!r} already.")
        _check_inside()
        for attempt in range(1, MOST_ATTEMPTS + 1):
            hub = _make_hub(group_name, world_size, gloo_timeout, {})
            try:
                _join(group_name, hub, rank, world_size, gloo_timeout / 1000)
                return
            except ActorError:  # the group of that name before has just ended, or was never made
                if attempt == MOST_ATTEMPTS:
                    raise
                time.sleep(PAUSE_SECONDS)


def create_collective_group(
    actors: Sequence[ActorHandle[Any]],
    world_size: int,
    ranks: Sequence[int],
    backend: str = Backend.NCCL,
    group_name: str = "default",
    gloo_timeout: int = TIMEOUT_MILLISECONDS,
) -> None:
    """Declare actors to be the ranks of a group; each joins with its first operation.

    The group lasts until ``destroy_collective_group`` is called here. Raises ``ValueError`` for wrong arguments, and
    ``RuntimeError`` where this process has declared a group of that name.
    """
    _check_backend(backend)
    _check_name(group_name)
    _check_ranks(world_size, ranks)
    if len(actors) != world_size or sorted(ranks) != list(range(world_size)):
        raise ValueError(f"world_size is {world_size}: that many actors, each with a rank of its own, are a group.")
    with _lock:
        if group_name in _declared:
            raise RuntimeError(f"The collective group {group_name!r} was declared already.")
        declared = {actor._actor_id.hex(): rank for actor, rank in zip(actors, ranks, strict=True)}
        _declared[group_name] = _make_hub(group_name, world_size, gloo_timeout, declared)


def destroy_collective_group(group_name: str = "default") -> None:
    """Leave a group; where this process has declared it, end it. Nothing happens where it is not known."""
    with _lock:
        group, hub = _groups.pop(group_name, None), _declared.pop(group_name, None)
    if group is not None and get(group.hub.leave.remote(group.rank)):
        hub = hub or group.hub
    if hub is not None:
        kill(hub)


def is_group_initialized(group_name: str = "default") -> bool:
    """Tell whether this process is in a group."""
    return group_name in _groups


def get_rank(group_name: str = "default") -> int:
    """Return this process's rank in a group; -1 where it is in none of that name."""
    return _groups[group_name].rank if group_name in _groups else -1


def get_collective_group_size(group_name: str = "default") -> int:
    """Return how many ranks a group has; -1 where this process is in none of that name."""
    return _groups[group_name].size if group_name in _groups else -1


# ------------------------------------------------------------------------------------ operations


def allreduce(tensor: Any, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Replace the tensor of every rank by all of them reduced."""
    array = _writable(tensor)
    (reduced,) = _group(group_name).meet(Operation("allreduce", ReduceOp(op)), [array])
    _fill(array, reduced)


def reduce(tensor: Any, dst_rank: int = 0, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Replace the tensor of one rank by those of all reduced."""
    group, array = _group(group_name), _writable(tensor)
    for reduced in group.meet(Operation("reduce", ReduceOp(op), _rank(group, dst_rank)), [array]):
        _fill(array, reduced)


def broadcast(tensor: Any, src_rank: int = 0, group_name: str = "default") -> None:
    """Replace the tensor of every rank by that of one."""
    group, array = _group(group_name), _writable(tensor)
    is_source = group.rank == _rank(group, src_rank)
    taken = group.meet(Operation("broadcast", root=src_rank), [array] if is_source else [])
    if not is_source:
        _fill(array, taken[0])


def allgather(tensor_list: Sequence[Any], tensor: Any, group_name: str = "default") -> None:
    """Fill ``tensor_list`` with the tensors of all ranks, in their order."""
    group = _group(group_name)
    places = _all_writable(group, tensor_list)
    for place, array in zip(places, group.meet(Operation("allgather"), [_array(tensor)]), strict=True):
        _fill(place, array)


def reducescatter(
    tensor: Any, tensor_list: Sequence[Any], group_name: str = "default", op: ReduceOp = ReduceOp.SUM
) -> None:
    """Fill ``tensor`` with what all ranks have in their ``tensor_list`` for this rank, reduced."""
    group, array = _group(group_name), _writable(tensor)
    given = [_array(one) for one in tensor_list]
    if len(given) != group.size:
        raise ValueError(f"tensor_list must have a tensor for each of the {group.size} ranks, got {len(given)}.")
    (reduced,) = group.meet(Operation("reducescatter", ReduceOp(op)), given)
    _fill(array, reduced)


def barrier(group_name: str = "default") -> None:
    """Wait until all ranks have come here."""
    _group(group_name).meet(Operation("barrier"), [])


def send(tensor: Any, dst_rank: int, group_name: str = "default") -> None:
    """Hand a tensor to another rank; returns when that has it."""
    group = _group(group_name)
    group.send(_array(tensor), _other(group, dst_rank))


def recv(tensor: Any, src_rank: int, group_name: str = "default") -> None:
    """Fill a tensor with what another rank sends; what comes from one rank comes in its order."""
    group, array = _group(group_name), _writable(tensor)
    _fill(array, group.receive(_other(group, src_rank)))


# ------------------------------------------------------------------------------------ joining


def _make_hub(name: str, size: int, milliseconds: int, declared: dict[str, int]) -> ActorHandle[Hub]:
    if milliseconds <= 0:
        raise ValueError(f"gloo_timeout must be positive, in milliseconds, got {milliseconds}.")
    options = {"name": _hub_name(name), "get_if_exists": True, "num_cpus": 0, "max_concurrency": MOST_RANKS}
    made: ActorClass[Hub, [int, float, dict[str, int]]] = ActorClass(Hub, options)
    return made.remote(size, milliseconds / 1000, declared)


def _hub_name(group_name: str) -> str:
    return f"collective group {group_name}"


def _join(name: str, hub: ActorHandle[Hub], rank: int, size: int, seconds: float) -> _Group:
    get(hub.join.remote(rank, size, get_runtime_context().get_worker_id()))
    _groups[name] = group = _Group(hub, rank, size, seconds)
    return group


def _group(name: str) -> _Group:
    """Return this process's part in a group, which it may take now, where it was declared to have one."""
    with _lock:
        if name in _groups:
            return _groups[name]
        _check_inside()
        actor = get_runtime_context().get_actor_id()
        try:
            hub = get_actor(_hub_name(name))
        except ValueError:
            actor = None
        if actor is not None:
            size, seconds, declared = get(hub.terms.remote())
            if actor in declared:
                return _join(name, hub, declared[actor], size, seconds)
    raise RuntimeError(f"The collective group {name!r} is not initialized in this process.")


# ------------------------------------------------------------------------------------ checks


def _check_inside() -> None:
    context = get_runtime_context()
    if context.get_task_id() is None and context.get_actor_id() is None:
        raise RuntimeError("Only tasks and actors can be in a collective group, not the driver.")


def _check_backend(backend: str) -> None:
    if Backend(backend) is Backend.NCCL:
        raise ValueError(
            "There is no NCCL here; pass backend='gloo' for arrays and CPU tensors, and use the collectives of your "
            "framework (torch.distributed) for those of GPUs."
        )


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"group_name must be a text that is not empty, got {name!r}.")


def _check_ranks(size: int, ranks: Sequence[int]) -> None:
    if size < 1:
        raise ValueError(f"world_size must be at least 1, got {size}.")
    for rank in ranks:
        if not 0 <= rank < size:
            raise ValueError(f"A rank is from 0 to {size - 1}, got {rank}.")


def _rank(group: _Group, rank: int) -> int:
    _check_ranks(group.size, [rank])
    return rank


def _other(group: _Group, rank: int) -> int:
    if _rank(group, rank) == group.rank:
        raise RuntimeError(f"Rank {rank} is this process: what is sent there would be received from itself.")
    return rank


def _array(tensor: Any) -> Any:
    """Return a tensor as an array that shares its memory."""
    if isinstance(tensor, numpy.ndarray):
        return tensor
    if hasattr(tensor, "detach"):
        return tensor.detach().numpy()
    raise TypeError(f"A tensor is a NumPy array or a CPU tensor of PyTorch, got {type(tensor).__name__}.")


def _writable(tensor: Any) -> Any:
    array = _array(tensor)
    if not array.flags.writeable:
        raise ValueError("The tensor is read-only, as what was read from a reference is: pass a copy.")
    return array


def _all_writable(group: _Group, tensors: Sequence[Any]) -> list[Any]:
    if len(tensors) != group.size:
        raise ValueError(f"tensor_list must have a tensor for each of the {group.size} ranks, got {len(tensors)}.")
    return [_writable(tensor) for tensor in tensors]


def _fill(array: Any, value: Any) -> None:
    if array.shape != value.shape:
        raise ValueError(f"The tensor has the shape {array.shape}, what comes has {value.shape}.")
    numpy.copyto(array, value)

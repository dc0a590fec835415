"""``ActorGroup``: actors of one class, all of which are called at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from shoal.actor import ActorClass, kill
from shoal.handle import ActorHandle
from shoal.objects import wait
from shoal_core.runtime.ownership.objects import ObjectRef


@dataclass(frozen=True)
class ActorWrapper:
    """One actor of a group."""

    actor: ActorHandle[Any]


class ActorGroupMethod:
    """A method of all actors of a group."""

    def __init__(self, group: ActorGroup, name: str) -> None:
        self._group = group
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ``TypeError``: methods of actors are not called directly."""
        raise TypeError(
            "ActorGroup methods cannot be called directly. "
            f"Instead of running 'object.{self._name}()', try 'object.{self._name}.remote()'."
        )

    def remote(self, *args: Any, **kwargs: Any) -> list[ObjectRef[Any]]:
        """Call the method of each actor with the same arguments, and return a reference for each, in order."""
        return [getattr(one.actor, self._name).remote(*args, **kwargs) for one in self._group.actors]


class ActorGroup:
    """A number of actors of one class, made with the same arguments: ``group.method.remote(...)`` calls all of them.

    Raises ``ValueError`` for a number that is impossible.
    """

    def __init__(
        self,
        actor_cls: type,
        num_actors: int = 1,
        num_cpus_per_actor: float = 1,
        num_gpus_per_actor: float = 0,
        resources_per_actor: dict[str, float] | None = None,
        init_args: Sequence[Any] | None = None,
        init_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if num_actors <= 0:
            raise ValueError(f"The provided `num_actors` must be greater than 0, got {num_actors}.")
        if num_cpus_per_actor < 0 or num_gpus_per_actor < 0:
            raise ValueError(
                "The number of CPUs and GPUs per actor must not be negative, got "
                f"num_cpus_per_actor={num_cpus_per_actor} and num_gpus_per_actor={num_gpus_per_actor}."
            )
        options: dict[str, Any] = {"num_cpus": num_cpus_per_actor, "num_gpus": num_gpus_per_actor}
        if resources_per_actor:
            options["resources"] = resources_per_actor
        self._class: ActorClass[Any] = ActorClass(actor_cls, options)
        self._made_of = (tuple(init_args or ()), dict(init_kwargs or {}))
        self._count = num_actors
        self.actors: list[ActorWrapper] = []
        self.start()

    def start(self) -> None:
        """Make the actors, unless they are there; they get the CPUs they need as these become free."""
        if not self.actors:
            self.add_actors(self._count)

    def add_actors(self, num_actors: int) -> None:
        """Make more actors."""
        args, kwargs = self._made_of
        self.actors += [ActorWrapper(self._class.remote(*args, **kwargs)) for _ in range(num_actors)]

    def remove_actors(self, actor_indexes: Sequence[int]) -> None:
        """Let the actors with these indices go."""
        gone = set(actor_indexes)
        self.actors = [one for index, one in enumerate(self.actors) if index not in gone]

    def shutdown(self, patience_s: float = 5) -> None:
        """End all actors when they have done what they were given, or kill them after ``patience_s`` seconds."""
        actors, self.actors = self.actors, []
        if patience_s > 0 and actors:
            _, late = wait(
                ended := [one.actor.__ray_terminate__.remote() for one in actors],
                num_returns=len(actors),
                timeout=patience_s,
            )
            actors = [one for one, ref in zip(actors, ended, strict=True) if ref in late]
        for one in actors:
            kill(one.actor)

    def __getattr__(self, name: str) -> ActorGroupMethod:
        if name.startswith("_") or name == "actors":
            raise AttributeError(name)
        if not self.actors:
            raise RuntimeError("This ActorGroup has been shutdown. Please start it again.")
        return ActorGroupMethod(self, name)

    def __len__(self) -> int:
        return len(self.actors)

    def __getitem__(self, index: int) -> ActorWrapper:
        return self.actors[index]

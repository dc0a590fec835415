"""Two drivers, one after the other, and actors that outlive them. Run: ``python examples/namespaces.py``.

Both drivers are this process here, on a cluster that it starts for them. With ``shoal up`` they would be any programs
that call ``shoal.init("auto", namespace=...)``.
"""

# mypy: disable-error-code="attr-defined"
# (mypy does not see what a decorator makes of a class.)

from __future__ import annotations

import shoal
from shoal.cluster_utils import Cluster
from shoal.util import list_named_actors


@shoal.remote(num_cpus=0)
class Actor:
    """Remembers who greeted it."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def greet(self, who: str) -> list[str]:
        """Note a name and return all of them."""
        self.seen.append(who)
        return self.seen

    def exit(self) -> None:
        """Leave."""
        shoal.actor.exit_actor()


def main() -> None:
    """Be three drivers in turn."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    with cluster.connect(namespace="colors"):
        orange = Actor.options(name="orange", lifetime="detached").remote()
        print("colors:", shoal.get(orange.greet.remote("the first driver")))

    with cluster.connect(namespace="fruit"):
        try:
            shoal.get_actor("orange")
        except ValueError:
            print("fruit: no orange in this namespace")
        Actor.options(name="orange", lifetime="detached").remote()
        orange = shoal.get_actor("orange", namespace="colors")
        print("fruit:", shoal.get(orange.greet.remote("the second driver")))

    with cluster.connect(namespace="colors"):
        print("there are:", list_named_actors(all_namespaces=True))
        shoal.kill(shoal.get_actor("orange"))  # from outside
        leaving = shoal.get_actor("orange", namespace="fruit").exit.remote()  # or by its own will
        try:
            shoal.get(leaving)
        except shoal.exceptions.ActorDiedError:
            print("left:", list_named_actors(all_namespaces=True))
    cluster.shutdown()


if __name__ == "__main__":
    main()

"""Placement groups: a gang that starts together or not at all. Run: ``python examples/placement_groups.py``."""

from __future__ import annotations

from shoal import get, get_runtime_context, remote
from shoal.cluster_utils import Cluster
from shoal.exceptions import ActorPlacementGroupRemoved
from shoal.util import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from shoal.util.scheduling_strategies import PlacementGroupSchedulingStrategy


class TrainerClass:
    """One member of a gang."""

    def node(self) -> str:
        """Return the node that this runs on."""
        return get_runtime_context().get_node_id()

    def load(self, parts: int) -> list[bool]:
        """Have tasks of its own run, and return whether each was in the gang's placement group too."""
        return get([in_group.remote() for _ in range(parts)])


Trainer = remote(num_cpus=1)(TrainerClass)


@remote(num_cpus=0.25)
def in_group() -> bool:
    """Return whether this runs in a placement group."""
    return get_current_placement_group() is not None


def main() -> None:
    """Start a cluster of three nodes on this machine, and reserve parts of it for gangs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        cluster.add_node(num_cpus=2)
        cluster.add_node(num_cpus=2)
        cluster.connect()

        gang = placement_group([{"CPU": 2}] * 3, strategy="STRICT_SPREAD", name="trainers")
        print("all bundles are reserved:", gang.wait(30))
        bundles = [
            PlacementGroupSchedulingStrategy(gang, index, placement_group_capture_child_tasks=True)
            for index in range(gang.bundle_count)
        ]
        trainers = [Trainer.options(scheduling_strategy=bundle).remote() for bundle in bundles]
        print("nodes of the gang:", len(set(get([trainer.node.remote() for trainer in trainers]))))
        print("their tasks run in the group:", get(trainers[0].load.remote(4)))

        other = placement_group([{"CPU": 1}])
        print("another gang has no room:", other.wait(0.1))
        print("found by its name:", get_placement_group("trainers") == gang)
        remove_placement_group(gang)
        print("now it has:", other.wait(30))
        try:
            get(trainers[0].node.remote())
        except ActorPlacementGroupRemoved:
            print("the trainers ended with their group, which is", placement_group_table(gang)["state"])
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()

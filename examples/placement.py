"""Where things run: nodes with labels, affinity, selectors that fall back. Run: ``python examples/placement.py``."""

from __future__ import annotations

from shoal import get, get_runtime_context, remote
from shoal.cluster_utils import Cluster
from shoal.exceptions import TaskUnschedulableError
from shoal.util.scheduling_strategies import In, NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy


@remote
def zone() -> str:
    """Return the zone of the node that this runs on."""
    return get_runtime_context().get_node_labels()["zone"]


@remote(num_cpus=0.1)
def measure(data: bytes) -> str:
    """Return the zone of the node that this runs on, and not the data."""
    return get_runtime_context().get_node_labels()["zone"]


@remote
def make(size: int) -> bytes:
    """Return something large."""
    return bytes(size)


def main() -> None:
    """Start a cluster of three nodes on this machine, and place tasks on them."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "labels": {"zone": "a"}})
    try:
        cluster.add_node(num_cpus=4, labels={"zone": "b", "disk": "ssd"})
        far = cluster.add_node(num_cpus=4, labels={"zone": "c"})
        cluster.connect()

        print("by a selector:", get(zone.options(label_selector={"disk": "ssd"}).remote()))
        fallback = [{"label_selector": {"zone": "in(c,d)"}}]
        task = zone.options(label_selector={"zone": "z"}, fallback_strategy=fallback)
        print("fallen back:", get(task.remote()))
        labels = NodeLabelSchedulingStrategy({"zone": In("a", "b")}, soft={"disk": In("ssd")})
        print("by labels:", get(zone.options(scheduling_strategy=labels).remote()))

        there = NodeAffinitySchedulingStrategy(far.node_id, soft=False)
        print("bound to a node:", get(zone.options(scheduling_strategy=there).remote()))
        data = make.options(scheduling_strategy=there).remote(10_000_000)
        print("where its data lies:", get(measure.remote(data)))

        nowhere = NodeAffinitySchedulingStrategy("0" * 16, soft=False)
        try:
            get(zone.options(scheduling_strategy=nowhere).remote())
        except TaskUnschedulableError as error:
            print(f"nowhere: {str(error).split(':')[0]}")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()

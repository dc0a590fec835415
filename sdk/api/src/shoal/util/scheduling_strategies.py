"""Where tasks and actors may be placed: what the option ``scheduling_strategy`` takes beside two words.

``"DEFAULT"`` packs nodes until they are half full, then spreads, and prefers the node that holds a task's large
arguments. ``"SPREAD"`` takes the emptiest node.
"""

from shoal.strategies import (
    DoesNotExist,
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
    PlacementGroupSchedulingStrategy,
    SchedulingStrategyT,
)

__all__ = [
    "DoesNotExist",
    "Exists",
    "In",
    "NodeAffinitySchedulingStrategy",
    "NodeLabelSchedulingStrategy",
    "NotIn",
    "PlacementGroupSchedulingStrategy",
    "SchedulingStrategyT",
]

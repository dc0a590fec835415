"""Names that programs import from here, as Ray's documentation does: ``from ray._raylet import ObjectRefGenerator``."""

from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.ownership.streams import ObjectRefGenerator

__all__ = ["ObjectRef", "ObjectRefGenerator"]

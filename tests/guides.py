"""The commands and programs in docs/, so that tests can run them as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(guide: str, language: str) -> list[str]:
    """Return what stands between the fences of one language, in order; a guide without any is an error."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs" / guide).read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"docs/{guide} has no block of {language}"
    return found

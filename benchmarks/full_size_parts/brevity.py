"""The second objective of the run at full size: a reward that is brought, so that one reward model is trained and not two."""

from collections.abc import Sequence
from typing import Any


def brevity(prompt: Sequence[dict[str, Any]], response: str) -> float:
    """Fewer words are better."""
    return -float(len(response.split()))

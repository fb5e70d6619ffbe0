"""What a run of an earlier version did where it recorded nothing: a later default changes no old run.

A setting that is added gets a line in `NEWER`, with the value that stands for what was done before it existed; an
option of a method whose default changes keeps its old value in `OPTIONS_OF_0_1`.
"""

from typing import Any

NEWER: dict[str, Any] = {
    "task": "classification",
    "steps": None,
    "recompute_units": None,
}
"""Settings that version 0.1 did not have, and what they were then."""

OPTIONS_OF_0_1: dict[str, dict[str, Any]] = {
    "feature-reconstruction": {"weight": 1.0, "normalize": True},
    "infopro": {
        "task": "softmax",
        "lambda_reconstruction": [1.0, 1.0],
        "lambda_task": [1.0, 1.0],
        "published": False,
        "temperature": 0.07,
    },
}
"""Each method's options in version 0.1, which recorded only those that were typed."""


def settings_as_recorded(settings: dict[str, Any]) -> dict[str, Any]:
    """Recorded flat settings, with those that did not exist yet as they were then."""
    return NEWER | settings


def options_as_recorded(method: str, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a method with every default filled in, as a run recorded them in its recipe.

    Args:
        method: its name.
        recorded: `Recipe.record()`; None of a run of version 0.1.
    """
    return dict(recorded["method_kwargs"]) if recorded else dict(OPTIONS_OF_0_1.get(method, {}))

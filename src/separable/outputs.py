"""What networks return, and how it is compared."""

from __future__ import annotations

from typing import Any, Literal, get_args

Outputs = Literal["auto", "logits", "values"]
"""scores of classes `[N, classes]`, or values; "auto" goes by the shape"""
OUTPUTS: tuple[Outputs, ...] = get_args(Outputs)
MEASURES = {"logits": "mean KL divergence of logits, nats", "values": "relative squared error"}
"""how outputs are compared, by what they are"""


def check_outputs(outputs: Any) -> None:
    """See that a word for the kind of outputs is known.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(outputs, str) or outputs not in OUTPUTS:
        raise ValueError(f"`outputs` (={outputs!r}) must be one of {', '.join(OUTPUTS)}")

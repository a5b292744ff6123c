"""How far an answer can be trusted: what the server says of its slide, and the probability of the option it names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class SlideTrust(NamedTuple):
    """What a checkpoint's calibration says of one slide, as far as it is known."""

    sufficiency: float | None = None
    in_distribution: float | None = None
    answer_temperature: float | None = None  # None: not known; 1.0: known to be none

    @classmethod
    def of(cls, record: object) -> SlideTrust:
        """Of the fields of POST /v1/wsi/select; what is missing, or no number, is None.

        A record without a temperature is of a checkpoint that has none.
        """
        if not isinstance(record, Mapping):
            return cls()
        temperature = _number(record, "answer_temperature")
        if temperature is None or temperature <= 0:
            temperature = 1.0
        return cls(_share(record, "sufficiency"), _share(record, "in_distribution"), temperature)


def confidence(label: str | None, logprobs: Mapping[str, float] | None, temperature: float | None) -> float | None:
    """The probability, in (0, 1], of the named option among the options, softmax(logprobs / temperature).

    An option that is not in `logprobs`, because it was not among the 20 likeliest tokens, counts as impossible.

    Args:
        label: that the answer names.
        logprobs: label -> log-probability.
        temperature: None: it is not known.

    Returns:
        None where an argument is None, or the label has no log-probability.
    """
    if label is None or logprobs is None or temperature is None or label not in logprobs:
        return None
    best = max(logprobs.values())
    weights = {name: math.exp((value - best) / temperature) for name, value in logprobs.items()}
    return weights[label] / sum(weights.values())


def _share(record: Mapping[str, Any], name: str) -> float | None:
    value = _number(record, name)
    return value if value is not None and 0 <= value <= 1 else None


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None

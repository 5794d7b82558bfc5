"""What `data.own_pairs.rewards` can mean, and what of the other settings it rules out: each problem is (message, keys to it).

Rewards that are columns are known of the pairs alone, so whatever scores samples is refused here, when the configuration is
read and before anything is trained.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

Problem = tuple[str, ...]
"""What is wrong, and the keys that lead to it from the section that is checked."""

_FUNCTION = re.compile(r".+\.py:[^\W\d]\w*")
_REMEDY = "leave it out, or bring a function"


def source_problem(function: str | None, *columns: str | None) -> Problem | None:
    """Why a source is none: it has to be one function or two columns."""
    given = [value is not None for value in (function, *columns)]
    if given not in ([True, False, False], [False, True, True]):
        return (
            "wanted one source of rewards: {function: my_rewards.py:concise}, or {column_chosen: ..., column_rejected: ...}",
        )
    if function is not None and not _FUNCTION.fullmatch(function):
        text = f"got {function!r:.80}, wanted a Python file and a function in it: my_rewards.py:concise"
        return text, "function"
    return None


def rewards_problem(
    functions: Mapping[str, str | None], names: Sequence[str], *, scored: bool, allow_code: bool
) -> Problem | None:
    """Why rewards cannot be had: of no objective, code that may not run, or columns of pairs that have none.

    Args:
        functions: by objective; None: columns.
        names: of all objectives.
        scored: whether there are pairs of scored responses.
    """
    if unknown := sorted(set(functions) - set(names)):
        return f"rewards name {unknown}; known objectives are {', '.join(names)}", "rewards"
    for objective, function in functions.items():
        if function is not None and not allow_code:
            text = (
                f"got {function}, whose code would run here; read it, and set data.own_pairs.allow_code: true"
            )
            return text, "rewards", objective, "function"
        if function is None and scored:
            text = (
                f"got columns, and every pair needs its reward for {objective}, also those of data.own_pairs.scored, which have "
                "no such columns; give all pairs in objectives, or bring a function"
            )
            return text, "rewards", objective
    return None


def samples_problem(from_columns: Sequence[str], source: str) -> Problem | None:
    """Why `calibration.source` cannot be had with columns."""
    if not from_columns or source != "reference_samples":
        return None
    remedy = "set calibration.source: validation_responses, or bring a function"
    return f"got reference_samples, and {no_samples(from_columns)}; {remedy}", "calibration", "source"


def debias_problem(brought: Iterable[str], features: Iterable[str]) -> Problem | None:
    """Why nothing can be debiased of a reward that is brought."""
    if not (named := sorted(set(features) & set(brought))):
        return None
    text = f"debias.features names {named}, whose rewards are brought: no training could be debiased; leave them out"
    return text, "features"


def policy_problem(
    from_columns: Sequence[str], methods: Sequence[str], *, constraints: bool, gamma: float
) -> Problem | None:
    """Why a policy cannot be trained with columns: it would need rewards of samples."""
    needs = {"methods": "maxmin" in methods, "constraints": constraints, "gamma": gamma > 0}
    if not from_columns or not (key := next((key for key, needed in needs.items() if needed), None)):
        return None
    text = f"policy.{key}: {'maxmin needs' if key == 'methods' else 'needs'} scored samples"
    return f"{text}, and {no_samples(from_columns)}; {_REMEDY}", key


def pairs_problem(from_columns: Sequence[str], reference_samples: int) -> Problem | None:
    """Why no pairs of samples can be had with columns."""
    if not from_columns or not reference_samples:
        return None
    text = f"got {reference_samples}, and {no_samples(from_columns)}; set 0, or bring a function"
    return text, "reference_samples"


def no_samples(from_columns: Sequence[str]) -> str:
    """Said also where what needs samples is left out."""
    return f"the rewards of {', '.join(from_columns)} are columns, which cannot score samples"

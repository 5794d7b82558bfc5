"""The objectives K of the built-in approaches, and what an objective of one's own may be called.

`data.approach: own_pairs` brings its own, the keys of `data.own_pairs.objectives`; what an approach aligns is
`ArtifactPaths.objectives`, in the one order every `[K, ...]` tensor uses.
"""

import re
from collections.abc import Iterable

OBJECTIVES: tuple[str, ...] = ("helpful", "harmless", "honest")
"""Names are directory names, configuration keys and result rows at once; index k is the position."""

SPLITS: tuple[str, ...] = ("train", "val", "test", "judge")
"""`judge` trains the evaluation's own reward models and is touched by nothing else."""

METHOD_LIKE = "debiased"
"""`dpo_debiased` is a method, and would also be DPO on the pairs of such an objective."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")
TAKEN_BY_WINDOWS = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)


def names_problem(names: Iterable[str]) -> str:
    """What is wrong with the names of objectives, which are file names and keys of the command line; empty where nothing is."""
    names = list(names)
    if odd := [name for name in names if not NAME.fullmatch(name) or TAKEN_BY_WINDOWS.fullmatch(name)]:
        return (
            f"got the name {odd[0]!r:.60}, wanted letters, digits and _ that a file may be called, 40 at most"
        )
    if METHOD_LIKE in names:
        return f"got the name {METHOD_LIKE}, which dpo_{METHOD_LIKE}, a method, has taken; choose another"
    if len({name.lower() for name in names}) < len(names):
        return f"got {', '.join(names)}, of which two differ in case alone: one folder on some systems; rename one"
    if len(names) == 1:
        return (
            f"got one objective, {names[0]}, wanted two or more: with one there is no trade-off to be pessimistic about; "
            "add another, or train on these pairs with DPO alone"
        )
    return ""

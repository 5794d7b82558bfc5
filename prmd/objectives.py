"""The objectives K that are aligned together, in the one order every `[K, ...]` tensor uses.

To add an objective, follow CONTRIBUTING.md ("Adding an objective"): pairs, a weight, a script and its name here.
"""

OBJECTIVES: tuple[str, ...] = ("helpful", "harmless", "honest")
"""Names are directory names, configuration keys and result rows at once; index k is the position here."""

SPLITS: tuple[str, ...] = ("train", "val", "test", "judge")
"""`judge` trains the evaluation's own reward models and is touched by nothing else."""

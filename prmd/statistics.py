"""Statistics in one import: outcome measures, intervals, paired comparisons.

Here: names only. What is measured is in `outcomes.py`, how sure it is in `intervals.py`, whether two methods differ
in `comparisons.py`; read them in this order.
"""

from prmd.comparisons import LengthControlled, holm, length_controlled_win_rate, mcnemar_exact, sign_flip_test
from prmd.intervals import (
    Estimate,
    accuracy_with_ties,
    bootstrap_mean,
    bootstrap_statistic,
    lower_tail_interval,
    minimum_band,
    paired_bootstrap,
    wilson_interval,
)
from prmd.outcomes import (
    best_of_n_expectation,
    best_of_n_kl,
    cvar_over_prompts,
    expected_max_order_statistic,
    hypervolume,
    pairwise_win_rate,
    pareto_dominance_rate,
    prob_any_order,
    violation_rate,
)

__all__ = [
    "Estimate",
    "LengthControlled",
    "accuracy_with_ties",
    "best_of_n_expectation",
    "best_of_n_kl",
    "bootstrap_mean",
    "bootstrap_statistic",
    "cvar_over_prompts",
    "expected_max_order_statistic",
    "holm",
    "hypervolume",
    "length_controlled_win_rate",
    "lower_tail_interval",
    "mcnemar_exact",
    "minimum_band",
    "paired_bootstrap",
    "pairwise_win_rate",
    "pareto_dominance_rate",
    "prob_any_order",
    "sign_flip_test",
    "violation_rate",
    "wilson_interval",
]

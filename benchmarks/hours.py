"""Hours of the configured trainings, from speeds that `benchmarks/speed.py --json` measured.

    python benchmarks/speed.py --json results.json
    python benchmarks/hours.py --json results.json [--config DIR] [--pairs-rm N] [--pairs-policy N]

A stage takes pairs x epochs x tokens per pair of its data, divided by the tokens per second of its row. Rows of the shape of
Qwen2.5-3B (measured on a GPU) give hours at the measured speed; rows of a smaller model are divided by the ratio of the
operations per token and give hours that were computed, not measured. Either holds for the hardware of the rows alone.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

from benchmarks.side_by_side.limit import DenseBatch
from benchmarks.side_by_side.setup import model_config
from benchmarks.side_by_side.shape import qwen_3b_shape, training_flops
from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR, find_user_path, places_tried
from prmd.config.loading import load_config
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError
from prmd.models.loading import load_model_config
from prmd.objectives import OBJECTIVES
from utils import user_errors_exit

HH_TRAIN_PAIRS = {"helpful": 43_835 + 22_007 + 52_421, "harmless": 42_537}
"""HH-RLHF's own train files: helpful-base, -online and -rejection-sampled; harmless-base."""
TRUTHFULQA_QUESTIONS = 817
POLICIES = 3
PAIR_TOKENS = {"helpful": (319, 161), "harmless": (237, 92), "honest": (68, 24)}
"""Tokens of a pair with its prompt once, and those of its responses among them: means of 400 random pairs of each of the
HH-RLHF files, weighted by `HH_TRAIN_PAIRS`, and of TruthfulQA, prompts cut to 512 tokens, in tokens of SmolLM2."""
_SHAPE = "qwen2.5_3b_shape"


@dataclass(frozen=True)
class Stage:
    """One line of the table.

    Attributes:
        pairs: pairs of one pass, in the train split.
        tokens: tokens of the whole stage, each prompt once; padding is below 1 % of them.
        speed: tokens per second.
    """

    name: str
    pairs: int
    epochs: float
    tokens: float
    speed: float

    @property
    def hours(self) -> float:
        return self.tokens / self.speed / 3600


def train_pairs(config: RewardModelConfig) -> dict[str, int]:
    """Pairs in the train split of each objective of `hh_truthfulqa`, at most: copies of held-out pairs are dropped too."""
    splits, truthful = config.data.splits, config.data.truthfulqa
    own_test = 1 - splits.val_fraction - splits.judge_fraction  # HH-RLHF brings test files
    pairs = {objective: round(n * own_test) for objective, n in HH_TRAIN_PAIRS.items()}
    questions = TRUTHFULQA_QUESTIONS * (1 - truthful.benchmark_fraction)
    pairs["honest"] = round(questions * truthful.pairs_per_question * (own_test - splits.test_fraction))
    limit = config.data.max_pairs_per_objective
    return {objective: min(n, limit or n) for objective, n in pairs.items()}


def find_row(rows: Sequence[dict[str, Any]], kind: str) -> tuple[dict[str, Any], bool]:
    """The row of a kind of training, and whether it was measured at the shape of Qwen2.5-3B.

    Raises:
        DataError: there is none.
    """
    for name, is_shape in ((f"{kind}_{_SHAPE}", True), (kind, False)):
        if found := [row for row in rows if row["name"] == name and row["ours"]]:
            return found[0], is_shape
    raise DataError(
        f"the results have no row {kind!r}; measure it with `python benchmarks/speed.py --json FILE`"
    )


def token_speed(
    row: dict[str, Any], *, is_shape: bool, response_share: float, config: RewardModelConfig
) -> float:
    """Tokens per second at the shape of Qwen2.5-3B: measured, or computed by the ratio of operations per token.

    Args:
        response_share: share of tokens whose logits are computed; 0 for reward models.
    """
    measured = row["ours"] * row["tokens_per_pair"]
    if is_shape:
        return measured
    own = load_model_config(model_config(row["model"]), config.paths)
    tokens = [DenseBatch(1, 1_000, round(1_000 * response_share))]
    wanted, spent = (training_flops(shape, tokens, head=True) for shape in (qwen_3b_shape(), own))
    return measured * spent / wanted


def stages(
    rows: Sequence[dict[str, Any]],
    config: RewardModelConfig,
    policy: PolicyConfig,
    *,
    pairs_rm: int | None = None,
    pairs_policy: int | None = None,
) -> tuple[list[Stage], list[str]]:
    """Every training of the configurations, and how its speed was come by.

    Args:
        rows: as `benchmarks/speed.py` writes them.
        pairs_rm, pairs_policy: train pairs of each reward model and of each policy; None takes those of the data sets.
    """
    sizes = train_pairs(config)
    fitted = 1 - config.ensemble.fit_fraction  # the rest of a train split is for the ensemble's heads alone
    pooled = pairs_policy or min(sum(sizes.values()), policy.training.max_pairs or sum(sizes.values()))
    weights = policy.policy.weights  # pairs are pooled by them, not by the sizes
    tokens, responses = (sum(weights[o] * PAIR_TOKENS[o][i] for o in OBJECTIVES) for i in (0, 1))
    work = [
        (f"reward model, {o}", "reward_model", pairs_rm or round(fitted * sizes[o]), PAIR_TOKENS[o][0], 0.0)
        for o in OBJECTIVES
    ]
    work += [(f"policy {i + 1}", "dpo", pooled, tokens, responses / tokens) for i in range(POLICIES)]
    made, sources = [], []
    for name, kind, pairs, per_pair, share in work:
        row, is_shape = find_row(rows, kind)
        epochs = (policy if kind == "dpo" else config).training.epochs
        speed = token_speed(row, is_shape=is_shape, response_share=share, config=config)
        made.append(Stage(name, pairs, epochs, pairs * epochs * per_pair, speed))
        sources.append(_source(row, is_shape))
    return made, list(dict.fromkeys(sources))


def _source(row: dict[str, Any], is_shape: bool) -> str:
    how = "measured at random weights of Qwen2.5-3B's shape"
    if not is_shape:
        how = f"COMPUTED, NOT MEASURED: {row['model']} was measured and divided by the operations per token"
    return f"{row['name']}: {how}; {row['hardware']}; {row['versions']}"


def table(made: Sequence[Stage], sources: Sequence[str]) -> str:
    """The hours as a Markdown table, and what they rest on."""
    lines = [
        "| training | pairs | epochs | million tokens | tokens per second | hours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for stage in made:
        cells = [stage.name, f"{stage.pairs:,}", f"{stage.epochs:g}", f"{stage.tokens / 1e6:,.1f}"]
        lines.append("| " + " | ".join([*cells, f"{stage.speed:,.3g}", _hours(stage.hours)]) + " |")
    tokens, hours = sum(s.tokens for s in made), sum(s.hours for s in made)
    lines += [f"| all | | | {tokens / 1e6:,.1f} | | {_hours(hours)} |", ""]
    lines += [
        "Training steps of Qwen2.5-3B alone, on this hardware and no other; data, scoring, sampling and evaluation come"
    ]
    lines[-1] += (
        " on top. Pairs are at most those of HH-RLHF and TruthfulQA: copies of held-out pairs are dropped."
    )
    return "\n".join([*lines, *(f"* {source}." for source in sources)])


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the rows, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="rows of benchmarks/speed.py"
    )
    parser.add_argument("--config", type=Path, default=CONFIG_DIR, help="folder with the YAML files")
    parser.add_argument("--pairs-rm", type=int, metavar="N", help="train pairs of each reward model")
    parser.add_argument("--pairs-policy", type=int, metavar="N", help="train pairs of each policy")
    options = parser.parse_args(arguments)
    file = find_user_path(options.json, "file")
    if file is None:
        raise DataError(
            f"--json: {places_tried(options.json)}; make it with `python benchmarks/speed.py --json {options.json}`"
        )
    config = load_config(options.config / "reward_model_config.yaml", RewardModelConfig)
    policy = load_config(options.config / "policy_config.yaml", PolicyConfig)
    rows = io.read_json(file)
    print(table(*stages(rows, config, policy, pairs_rm=options.pairs_rm, pairs_policy=options.pairs_policy)))


if __name__ == "__main__":
    with user_errors_exit():
        main()

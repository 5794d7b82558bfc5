"""Hours of the configured trainings, from rows that `benchmarks/full_size.py` or `benchmarks/speed.py` measured, or assumed.

    python benchmarks/hours.py [--config DIR] [--pairs-rm N] [--pairs-policy N]
    python benchmarks/hours.py --rows benchmarks/results/CARD.jsonl

A stage takes pairs x epochs x tokens per pair of its data, divided by the tokens per second of its row. Rows of the shape of
Qwen2.5-3B (measured on a GPU) give hours at the measured speed, the newest row of a kind and those of the stages themselves
first; rows of a smaller model are divided by the ratio of the operations per token and give hours that were computed, not
measured. Either holds for the hardware of the rows alone. Without rows the hours are those of an RTX 5090 at an assumed
share of its peak, MFU as `side_by_side/mfu.py` defines it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import torch

from benchmarks.full_size_parts.project import FULL_SHAPE
from benchmarks.side_by_side.limit import DenseBatch
from benchmarks.side_by_side.mfu import counted_parameters, peak_flops
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
from prmd.policies.methods import BASELINE, SOUP
from prmd.policies.pairs import objective_draws
from prmd.training.rehearsal import meta_model
from utils import user_errors_exit

HH_TRAIN_PAIRS = {"helpful": 43_835 + 22_007 + 52_421, "harmless": 42_537}
"""HH-RLHF's own train files: helpful-base, -online and -rejection-sampled; harmless-base."""
TRUTHFULQA_QUESTIONS = 817
PAIR_TOKENS = {"helpful": (319, 161), "harmless": (237, 92), "honest": (68, 24)}
"""Tokens of a pair with its prompt once, and those of its responses among them: means of 400 random pairs of each of the
HH-RLHF files, weighted by `HH_TRAIN_PAIRS`, and of TruthfulQA, prompts cut to 512 tokens, in tokens of SmolLM2."""
_SHAPE = "qwen2.5_3b_shape"
STAGES = {"reward_model": "reward_model", "dpo": "policy"}
"""Stages of `benchmarks/full_size.py` by the kind of training whose steps they measure."""
ASSUMED_CARD, ASSUMED_MFU = "NVIDIA GeForce RTX 5090", (0.2, 0.3, 0.4)
"""What stands in the place of rows where there are none."""


@dataclass(frozen=True)
class Stage:
    """One line of the table.

    Attributes:
        pairs: pairs of one pass, in the train split.
        tokens: tokens of the whole stage, each prompt once; padding is below 1 % of them.
        kind: `reward_model` or `dpo`.
        response_share: share of tokens whose logits are computed; 0 for reward models.
    """

    name: str
    pairs: int
    epochs: float
    tokens: float
    kind: str
    response_share: float

    def hours(self, speed: float) -> float:
        """Hours at so many tokens per second."""
        return self.tokens / speed / 3600


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
    """The newest row of a kind of training, and whether it was measured at the shape of Qwen2.5-3B.

    Args:
        rows: of either measurement, the newest last.

    Raises:
        DataError: there is none.
    """
    full = [
        row
        for row in rows
        if (row.get("phase"), row.get("shape"), row.get("stage")) == ("step", FULL_SHAPE, STAGES[kind])
    ]
    if full:
        return full[-1], True
    for name, is_shape in ((f"{kind}_{_SHAPE}", True), (kind, False)):
        if found := [row for row in rows if row.get("name") == name and row["ours"]]:
            return found[-1], is_shape
    raise DataError(
        f"the results have no row of {kind!r}; measure it with `python benchmarks/full_size.py --json FILE` on a GPU, or "
        "with `python benchmarks/speed.py --json FILE`"
    )


def token_speed(
    row: dict[str, Any], *, is_shape: bool, response_share: float, config: RewardModelConfig
) -> float:
    """Tokens per second at the shape of Qwen2.5-3B: measured, or computed by the ratio of operations per token.

    Args:
        response_share: as in `Stage`.
    """
    if "phase" in row:
        return row["tokens_per_second"]
    measured = row["ours"] * row["tokens_per_pair"]
    if is_shape:
        return measured
    own = load_model_config(model_config(row["model"]), config.paths)
    tokens = [DenseBatch(1, 1_000, round(1_000 * response_share))]
    wanted, spent = (training_flops(shape, tokens, head=True) for shape in (qwen_3b_shape(), own))
    return measured * spent / wanted


def stages(
    config: RewardModelConfig,
    policy: PolicyConfig,
    *,
    pairs_rm: int | None = None,
    pairs_policy: int | None = None,
) -> list[Stage]:
    """Every training that `run_pipeline.py` does by the configurations, but for judges; policies draw from all objectives.

    Args:
        pairs_rm, pairs_policy: train pairs of each reward model and of each policy; None takes those of the data sets.
    """
    sizes = train_pairs(config)
    fitted = 1 - config.ensemble.fit_fraction  # the rest of a train split is for the ensemble's heads alone
    pooled = pairs_policy or min(sum(sizes.values()), policy.training.max_pairs or sum(sizes.values()))
    # as many of each objective as its weight asks for and `pairs.max_repeats` allows
    draws = objective_draws(sizes, policy.policy.weights, pooled, policy.pairs.max_repeats)
    tokens, responses = (sum(draws[o] * PAIR_TOKENS[o][i] for o in OBJECTIVES) for i in (0, 1))
    epochs = config.training.epochs
    made = []
    for o in OBJECTIVES:
        pairs = pairs_rm or round(fitted * sizes[o])
        all_tokens = pairs * epochs * PAIR_TOKENS[o][0]
        made.append(Stage(f"reward model, {o}", pairs, epochs, all_tokens, "reward_model", 0.0))
    epochs, share = policy.training.epochs, responses / tokens
    for method in dict.fromkeys((BASELINE, *policy.policy.methods, "hierarchical")):
        if method != SOUP:
            made.append(Stage(f"policy, {method}", pooled, epochs, epochs * tokens, "dpo", share))
    return made


def speeds(
    rows: Sequence[dict[str, Any]], made: Sequence[Stage], config: RewardModelConfig
) -> tuple[list[float], list[str]]:
    """Tokens per second of each stage, and how they were come by.

    Args:
        rows: as `benchmarks/full_size.py` or `benchmarks/speed.py` writes them.
    """
    found, sources = [], []
    for stage in made:
        row, is_shape = find_row(rows, stage.kind)
        found.append(token_speed(row, is_shape=is_shape, response_share=stage.response_share, config=config))
        sources.append(_source(row, is_shape))
    return found, list(dict.fromkeys(sources))


def _source(row: dict[str, Any], is_shape: bool) -> str:
    how = "measured at random weights of Qwen2.5-3B's shape"
    if "phase" in row:
        used = f"torch {row['torch']}, transformers {row['transformers']}, TRL {row['trl']}, commit {row['commit']}"
        cap = f"capped at {row['cap_gib']:g} GiB" if row["cap_gib"] else "not capped"
        return (
            f"{row['stage']}: {how}, in the stage itself; {row['processes']} x {row['card']}, {cap}; {used}"
        )
    if not is_shape:
        how = f"COMPUTED, NOT MEASURED: {row['model']} was measured and divided by the operations per token"
    return f"{row['name']}: {how}; {row['hardware']}; {row['versions']}"


def table(made: Sequence[Stage], found: Sequence[float], sources: Sequence[str]) -> str:
    """The hours as a Markdown table, and what they rest on.

    Args:
        found: tokens per second of each stage.
    """
    lines = [
        "| training | pairs | epochs | million tokens | tokens per second | hours |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for stage, speed in zip(made, found, strict=True):
        cells = [stage.name, f"{stage.pairs:,}", f"{stage.epochs:g}", f"{stage.tokens / 1e6:,.1f}"]
        lines.append("| " + " | ".join([*cells, f"{speed:,.3g}", _hours(stage.hours(speed))]) + " |")
    tokens = sum(stage.tokens for stage in made)
    hours = sum(stage.hours(speed) for stage, speed in zip(made, found, strict=True))
    lines += [f"| all | | | {tokens / 1e6:,.1f} | | {_hours(hours)} |", "", _SCOPE]
    return "\n".join([*lines, *(f"* {source}." for source in sources)])


_SCOPE = (
    "Training steps of Qwen2.5-3B alone, on this hardware and no other; data, scoring, sampling and evaluation come on top. "
    "Pairs are at most those of HH-RLHF and TruthfulQA: copies of held-out pairs are dropped."
)


def assumed_table(made: Sequence[Stage]) -> str:
    """The same where nothing was measured, at each of `ASSUMED_MFU` of `ASSUMED_CARD`: operations are 6 N tokens."""
    model = meta_model(qwen_3b_shape(), task="policy", dtype=torch.bfloat16, lora=None)
    counted, peak = counted_parameters(model), peak_flops(ASSUMED_CARD)
    shares = " | ".join(f"hours at MFU {share:g}" for share in ASSUMED_MFU)
    lines = [f"| training | pairs x epochs | million tokens | 1e18 operations | {shares} |"]
    lines.append("|---|" + "---:|" * (3 + len(ASSUMED_MFU)))

    def line(name: str, pairs: str, tokens: float) -> str:
        operations = 6.0 * counted * tokens
        cells = [name, pairs, f"{tokens / 1e6:,.1f}", f"{operations / 1e18:.3g}"]
        cells += [_hours(operations / (share * peak) / 3600) for share in ASSUMED_MFU]
        return "| " + " | ".join(cells) + " |"

    lines += [line(s.name, f"{s.pairs:,} x {s.epochs:g}", s.tokens) for s in made]
    lines.append(line("all", "", sum(stage.tokens for stage in made)))
    speeds_there = ", ".join(f"{share * peak / (6 * counted):,.0f}" for share in ASSUMED_MFU)
    lines += [
        "",
        f"ASSUMED, NOT MEASURED: {ASSUMED_CARD}, {peak / 1e12:g}e12 FLOP/s, {speeds_there} tokens per second. {_SCOPE}",
    ]
    return "\n".join(lines)


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the rows where there are any, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="of benchmarks/full_size.py or speed.py, as --json wrote them",
    )
    parser.add_argument("--config", type=Path, default=CONFIG_DIR, help="folder with the YAML files")
    parser.add_argument("--pairs-rm", type=int, metavar="N", help="train pairs of each reward model")
    parser.add_argument("--pairs-policy", type=int, metavar="N", help="train pairs of each policy")
    options = parser.parse_args(arguments)
    config = load_config(options.config / "reward_model_config.yaml", RewardModelConfig)
    policy = load_config(options.config / "policy_config.yaml", PolicyConfig)
    made = stages(config, policy, pairs_rm=options.pairs_rm, pairs_policy=options.pairs_policy)
    if options.rows is None:
        print(assumed_table(made))
        return
    file = find_user_path(options.rows, "file")
    if file is None:
        raise DataError(
            f"--rows: {places_tried(options.rows)}; make it with `python benchmarks/full_size.py --json {options.rows}`"
        )
    print(table(made, *speeds(io.read_jsonl(file), made, config)))


if __name__ == "__main__":
    with user_errors_exit():
        main()

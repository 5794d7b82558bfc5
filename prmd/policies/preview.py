"""What stage 3 would do and what it could reach, before any policy is trained: the dry run and the closed-form table.

    pi*(y_i | x) = softmax_i( reward_scale R(x, y_i) / beta )   on the n samples of a prompt, at one KL for all methods

The table reads what stage 2 or an earlier stage 3 left in `data/cache` and loads no model. The gains are those of the
training ensemble's mean members, a proxy: they say what the operator trades, not what a judge would see.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths, reward_model_command, stage_command
from prmd.artifacts.runs import read_run
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import UserError
from prmd.inference.cache import ScoreTable
from prmd.inference.generation import sample_rows
from prmd.inference.reference import reference_samples, samples_table
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import Tokens, tokenize_prompt
from prmd.objectives import OBJECTIVES
from prmd.pairs import read_pairs
from prmd.pessimism.kl_budget import gate_row, usable_kl_target
from prmd.policies.methods import (
    BASELINE,
    POLICY_METHODS,
    SOUP,
    SOUP_MEMBERS,
    reference_sample_count,
    uses_gamma,
)
from prmd.policies.robust_reward import solve_reward
from prmd.policies.sample_pairs import GAMMA_SAMPLES
from prmd.policies.scores import ScaleResponses, sampling_config, score_samples
from prmd.rewards.reward_model import RewardModel, load_reward_models
from prmd.runtime import is_main_process
from prmd.training.dry_run import Sampled, describe_training

logger = logging.getLogger(__name__)


def describe_policies(config: PolicyConfig, methods: Sequence[str]) -> None:
    """Log what training these methods would read, do and write."""
    train, val = (
        [config.paths.split(objective, split) for objective in OBJECTIVES] for split in ("train", "val")
    )
    if any(POLICY_METHODS[method].reads_rewards for method in methods):
        describe_reward_models(config.paths)
    for method in methods:
        directory = config.paths.policy(method, config.run_name)
        if method == SOUP:
            logger.info("would average %s to %s; nothing is trained", ", ".join(SOUP_MEMBERS), directory)
            continue
        describe_training(
            config.shared,
            name=f"policy {method}",
            trained_on=train,
            also_read=val,
            tuning=config.tuning,
            training=config.training,
            task="policy",
            output=directory,
            sampled=(sampled := _sampled(config, method)),
        )
        if method == BASELINE:
            logger.info(
                "TRL trains it: prompts twice, padded, all logits at once; the memory above is too low"
            )
        if sampled.paired:
            times, share = 1 / (1 - config.pairs.share), config.pairs.share
            logger.info(
                "with pairs of reference samples, %.0f%% of all: %.3g times these steps", 100 * share, times
            )


def gamma_lengths(config: PolicyConfig, methods: Sequence[str]) -> tuple[int, ...]:
    """Most tokens of each reference sample that the gamma term of one of these methods puts behind every pair."""
    used = any(uses_gamma(config, method) for method in methods)
    return (config.shared.calibration.max_new_tokens,) * GAMMA_SAMPLES if used else ()


def _sampled(config: PolicyConfig, method: str) -> Sampled:
    pairs = (
        config.pairs.reference_samples and config.pairs.share and POLICY_METHODS[method].reward is not None
    )
    tokens = config.shared.calibration.max_new_tokens if pairs else 0
    return Sampled(gamma_lengths(config, [method]), tokens)


def describe_reward_models(paths: ArtifactPaths) -> None:
    """Log the reward models a policy stage reads, or the commands that train them."""
    for objective in OBJECTIVES:
        folder = paths.reward_model(objective)
        found = (
            "finished" if read_run(folder) else f"missing; make it with `{reward_model_command(objective)}`"
        )
        logger.info("would read  %s: %s", folder, found)


GATE_METHODS = tuple(name for name, method in POLICY_METHODS.items() if method.loss == "distil")
"""Methods with a reward R(x, y), which alone has a closed-form optimum."""


def gate_file(paths: ArtifactPaths) -> Path:
    """Where the gate's numbers lie."""
    return paths.reward_analysis / "gate.json"


def preview_gate(config: PolicyConfig) -> None:
    """The gate before anything is trained, of the reward models that are finished."""
    try:
        models = load_reward_models(config.shared)  # first: without them the base model need not be there
        tokenizer = load_tokenizer(config.shared.model, config.paths)
    except UserError as error:
        logger.info("gate        not computed: %s", error)
        return
    describe_gate(config, models, tokenizer)


def describe_gate(
    config: PolicyConfig, models: Sequence[RewardModel], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Compute, log and write the gate, or say in one line what is missing."""
    try:
        scored = cached_responses(config, models, tokenizer)
    except UserError as error:
        logger.info("gate        not computed: %s", error)
        return
    if isinstance(scored, str):
        logger.info("gate        not computed: %s", scored)
        return
    table = gate_table(config, scored)
    for line in gate_lines(table):
        logger.info("gate        %s", line)
    if is_main_process():
        logger.info("gate        written to %s", io.write_json(gate_file(config.paths), table))


def cached_responses(
    config: PolicyConfig, models: Sequence[RewardModel], tokenizer: PreTrainedTokenizerBase
) -> ScaleResponses | str:
    """Scored reference samples from the cache alone; or what is missing, with the command.

    Stage 3's own number of samples a prompt if those are there, else that of the calibration in stage 2; of held-out
    prompts if any are there, else of training prompts.
    """
    if not reference_sample_count(config):
        return (
            "it needs scored samples of the reference and none are configured (calibration.source: "
            "validation_responses); set pairs.reference_samples=16 or calibration.source=reference_samples"
        )
    by_prompt = config.shared.calibration.source == "reference_samples"
    splits = {"held-out prompts": "val", "training prompts": "train"}
    prompts = {source: _prompts(config, tokenizer, split) for source, split in splits.items()}
    for shared in (sampling_config(config), config.shared):
        for source, candidates in prompts.items():
            found = _scored_prompts(shared, models, tokenizer, candidates)
            if found:
                samples = reference_samples(shared, tokenizer, found)
                return score_samples(models, found, samples, by_prompt=by_prompt, source=source)
    if by_prompt:
        return f"no scored reference samples are cached; stage 2 ({reward_model_command('*')}) makes them"
    return f"no scored reference samples are cached; {stage_command('pessimistic_dpo')} makes them"


def _prompts(config: PolicyConfig, tokenizer: PreTrainedTokenizerBase, split: str) -> list[Tokens]:
    """Distinct prompts of a split of all objectives, as stages 2 and 3 cut them."""
    lengths = {config.shared.training.max_length, config.training.max_length}
    pairs = [pair for objective in OBJECTIVES for pair in read_pairs(config.paths, objective, split)]
    prompts = (tokenize_prompt(tokenizer, p.prompt, max_length=n) for p in pairs for n in sorted(lengths))
    return list(dict.fromkeys(prompts))


def _scored_prompts(
    shared: RewardModelConfig,
    models: Sequence[RewardModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
) -> list[Tokens]:
    """The prompts whose samples are cached with the rewards of every model."""
    table = samples_table(shared, tokenizer)  # `reference_samples` would load a model for what is missing
    sampled = [prompt for prompt in prompts if table.holds([prompt])]
    if not sampled:
        return []
    samples = reference_samples(shared, tokenizer, sampled)
    kept = set(range(len(sampled)))
    for model in models:
        rewards = ScoreTable(shared.paths.cache("rewards", model.fingerprint), model.members)
        rows = sample_rows(sampled, samples, model.tokenizer, keep_suffix=True)
        kept &= {i for i, row in enumerate(rows) if rewards.holds([row])}
    return [sampled[i] for i in sorted(kept)]


def gate_table(config: PolicyConfig, scored: ScaleResponses) -> dict[str, Any]:
    """The gate of every method with a reward at one KL, as JSON."""
    policy, samples = config.policy, scored.by_prompt()
    budget = usable_kl_target(policy.kl_target, scored.samples_per_prompt)
    rewards, rows, refused = samples.mean(dim=1), [], []
    for method in GATE_METHODS:
        try:
            robust = solve_reward(policy, method, scored)(samples)
            row = gate_row(robust=robust, rewards=rewards, beta=policy.beta, kl_target=budget)
        except (UserError, ValueError) as error:
            refused.append({"method": method, "reason": str(error)})
            continue
        rows.append(
            {"method": method, **row.to_json(), "gains": dict(zip(OBJECTIVES, row.gains, strict=True))}
        )
    return {
        "kl_target": policy.kl_target,
        "kl": budget,
        "prompts": samples.shape[2],
        "samples_per_prompt": scored.samples_per_prompt,
        "source": scored.source,
        "rows": rows,
        "refused": refused,
    }


def gate_lines(table: dict[str, Any]) -> list[str]:
    """The gate as lines for the log."""
    lines = [
        f"{table['source']}: {table['prompts']} prompts, {table['samples_per_prompt']} samples each, at {table['kl']:.3g} nats"
        + (
            f" (kl_target {table['kl_target']:g} needs more samples)"
            if table["kl"] < table["kl_target"]
            else ""
        )
    ]
    for row in table["rows"]:
        gains = ", ".join(f"{k} {gain:+.3f}" for k, gain in row["gains"].items())
        lines.append(
            f"{row['method']:<12} gains {gains}; worst {row['worst_gain']:+.3f}; mean of minimum {row['mean_of_min']:+.3f} "
            f"(reference {row['reference_mean_of_min']:+.3f}); effective samples {row['effective_sample_size']:.1f}"
        )
    return lines + [f"{row['method']:<12} not computed: {row['reason']}" for row in table["refused"]]

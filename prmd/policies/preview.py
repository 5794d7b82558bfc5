"""What stage 3 would do and what it could reach, before any policy is trained: the dry run and the closed-form table.

    pi*(y_i | x) = softmax_i( reward_scale R(x, y_i) / beta )   on the n samples of a prompt, at one KL for all methods

The table reads what stage 2 or an earlier stage 3 left in `data/cache` and loads no model. The gains are those of the
training ensemble's mean members, a proxy: they say what the operator trades, not what a judge would see.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths, reward_model_command, stage_command
from prmd.artifacts.runs import read_run
from prmd.config.policy import PolicyConfig, PolicySection
from prmd.config.shared import SharedConfig
from prmd.errors import UserError
from prmd.inference.reference import calibration_sampling, samples_table, with_sample_count
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import Tokens
from prmd.pessimism.kl_budget import gate_row, usable_kl_target
from prmd.policies.methods import (
    BASELINE,
    POLICY_METHODS,
    SOUP,
    method_of,
    reference_sample_count,
    soup_members,
    uses_gamma,
)
from prmd.policies.pairs import (
    PairTokens,
    ScaleResponses,
    Split,
    describe_draws,
    drawn_pairs,
    draws_line,
    read_splits,
    split_sizes,
    training_mixture,
)
from prmd.policies.robust_reward import solve_reward
from prmd.policies.sample_pairs import GAMMA_SAMPLES
from prmd.policies.scores import (
    SampledPrompts,
    centers_by_prompt,
    sample_prompts,
    score_samples,
)
from prmd.rewards.reward_model import Scorer, load_reward_models
from prmd.runtime import is_main_process
from prmd.training.dry_run import Sampled, describe_training, read_if_there

logger = logging.getLogger(__name__)


def describe_policies(config: PolicyConfig, methods: Sequence[str]) -> None:
    """Log what training these methods would read, do and write."""
    paths, shared, share = config.paths, config.shared, config.pairs.share
    files = [paths.split(k, split) for split in ("train", "val") for k in paths.objectives]
    if any(method_of(method).reads_rewards for method in methods):
        describe_reward_models(paths)
    splits = read_if_there(files, partial(read_splits, paths))
    train = splits["train"] if splits else {}
    sizes, count = split_sizes(train), reference_sample_count(config.pairs, shared.calibration)
    for method in dict.fromkeys(methods):
        directory, reads = paths.policy(method, config.run_name), method_of(method).reads_rewards
        if method == SOUP:
            members = ", ".join(soup_members(paths.objectives))
            logger.info("would average %s to %s; nothing is trained", members, directory)
            continue
        sampled = _sampled(config, method)
        mixture = training_mixture(config, train, method_of(method).objective)
        drawn = drawn_pairs(sizes, mixture) if train else []
        draws = describe_draws(sizes, mixture) if train else {}
        describe_training(
            shared,
            name=f"policy {method}",
            pairs=[train[k][i] for k, i in dict.fromkeys(drawn)],
            epoch=sum(int(row["draws"]) for row in draws.values()),
            drawn=len(drawn),
            tuning=config.tuning,
            training=config.training,
            task="policy",
            output=directory,
            sampled=sampled,
            sampling=with_sample_count(shared, count).calibration if count and reads else None,
        )
        if draws:
            logger.info("%s", draws_line(draws))
        if method == BASELINE:
            logger.info(
                "TRL trains it: prompts twice, padded, all logits at once; the memory above is too low"
            )
        if sampled.paired:
            times = 1 / (1 - share)
            logger.info(
                "with pairs of reference samples, %.0f%% of all: %.3g times these steps", 100 * share, times
            )


def gamma_lengths(policy: PolicySection, methods: Sequence[str], max_new_tokens: int) -> tuple[int, ...]:
    """Most tokens of each reference sample that the gamma term of one of these methods puts behind every pair.

    Args:
        max_new_tokens: of a reference sample.
    """
    used = any(uses_gamma(policy, method) for method in methods)
    return (max_new_tokens,) * GAMMA_SAMPLES if used else ()


def _sampled(config: PolicyConfig, method: str) -> Sampled:
    longest = config.shared.calibration.max_new_tokens
    drawn = config.pairs.reference_samples and config.pairs.share
    pairs = drawn and method_of(method).reward is not None
    return Sampled(gamma_lengths(config.policy, [method], longest), longest if pairs else 0)


def describe_reward_models(paths: ArtifactPaths) -> None:
    """Log the reward models a policy stage reads, or the commands that train them."""
    for objective in paths.objectives:
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
    shared, training = config.shared, config.training
    try:
        models = load_reward_models(shared)  # first: without them the base model need not be there
        tokenizer = load_tokenizer(shared.model, shared.paths)
        drawn = reference_sample_count(config.pairs, shared.calibration)
        splits = read_splits(shared.paths) if drawn else {}
        tokens = PairTokens(tokenizer, max_length=training.max_length, over_length=training.over_length)
    except UserError as error:
        logger.info("gate        not computed: %s", error)
        return
    describe_gate(config, models, tokens, splits)


def describe_gate(
    config: PolicyConfig, models: Sequence[Scorer], tokens: PairTokens, splits: Mapping[str, Split]
) -> None:
    """Compute, log and write the gate, or say in one line what is missing."""
    try:
        scored = cached_responses(config, models, tokens, splits)
    except UserError as error:
        logger.info("gate        not computed: %s", error)
        return
    if isinstance(scored, str):
        logger.info("gate        not computed: %s", scored)
        return
    table = gate_table(config.policy, scored)
    for line in gate_lines(table):
        logger.info("gate        %s", line)
    if is_main_process():
        logger.info("gate        written to %s", io.write_json(gate_file(config.paths), table))


def cached_responses(
    config: PolicyConfig, models: Sequence[Scorer], tokens: PairTokens, splits: Mapping[str, Split]
) -> ScaleResponses | str:
    """Scored reference samples from the cache alone; or what is missing, with the command.

    Stage 3's own number of samples a prompt if those are there, else that of the calibration in stage 2; of held-out
    prompts if any are there, else of training prompts.

    Args:
        splits: from `pairs.read_splits`; not read where no samples are drawn.
    """
    shared, sample_count = config.shared, reference_sample_count(config.pairs, config.shared.calibration)
    if not sample_count:
        return (
            "it needs scored samples of the reference and none are configured (calibration.source: "
            "validation_responses); set pairs.reference_samples=16 or calibration.source=reference_samples"
        )
    by_prompt = centers_by_prompt(shared.calibration)
    lengths = sorted({config.reward_model_config.training.max_length, tokens.max_length})
    named = {"held-out prompts": "val", "training prompts": "train"}
    prompts = {source: distinct_prompts(splits[split], tokens, lengths) for source, split in named.items()}
    drawn = (
        with_sample_count(shared, sample_count),
        calibration_sampling(shared),
        shared,
    )  # the last: earlier versions
    for sampling in drawn:
        for source, candidates in prompts.items():
            if found := _scored_prompts(sampling, models, tokens, candidates):
                return score_samples(models, found, by_prompt=by_prompt, source=source)
    if by_prompt:
        return f"no scored reference samples are cached; stage 2 ({shared.paths.reward_model_commands}) makes them"
    return f"no scored reference samples are cached; {stage_command('pessimistic_dpo')} makes them"


def distinct_prompts(split: Split, tokens: PairTokens, lengths: Iterable[int]) -> list[Tokens]:
    """Distinct prompts of a split of all objectives, cut to each of these lengths as stages 2 and 3 do."""
    messages = [pair.prompt for pairs in split.values() for pair in pairs]
    return list(dict.fromkeys(tokens.of_prompt(prompt, length) for prompt in messages for length in lengths))


def _scored_prompts(
    sampling: SharedConfig, models: Sequence[Scorer], tokens: PairTokens, prompts: Sequence[Tokens]
) -> SampledPrompts | None:
    """The prompts whose samples are cached with the rewards of every model; None where there are none."""
    table = samples_table(sampling, tokens.tokenizer)  # sampling would load a model for what is missing
    cached = [prompt for prompt in prompts if table.holds([prompt])]
    if not cached:
        return None
    messages = [tokens.messages_of(prompt) for prompt in cached]
    found = sample_prompts(sampling, tokens.tokenizer, cached, messages)
    held = [model.held(found.rows_for_rewards(model)) for model in models]
    kept = [i for i, everywhere in enumerate(zip(*held, strict=True)) if all(everywhere)]
    if not kept:
        return None
    parts = (cached, found.responses, found.messages)
    return SampledPrompts(*([part[i] for i in kept] for part in parts))


def gate_table(policy: PolicySection, scored: ScaleResponses) -> dict[str, Any]:
    """The gate of every method with a reward at one KL, as JSON."""
    samples = scored.by_prompt()
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
            {"method": method, **row.to_json(), "gains": dict(zip(policy.weights, row.gains, strict=True))}
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

"""What `--dry-run` says of a training: what would be read, trained and written, and whether it fits the memory.

No model is loaded and nothing is written; a missing input is said with the command that makes it. The lines on memory are
made in `training.dry_run`; the closed-form gate, which a dry run of pessimistic_dpo.py adds, is in `policy_gate`.
"""

import logging
from collections.abc import Sequence

from prmd.artifacts.paths import ArtifactPaths, reward_model_command
from prmd.artifacts.runs import read_run
from prmd.config.policy import PolicyConfig
from prmd.objectives import OBJECTIVES
from prmd.policy_methods import BASELINE, POLICY_METHODS, SOUP, SOUP_MEMBERS, uses_gamma
from prmd.policy_samples import GAMMA_SAMPLES
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

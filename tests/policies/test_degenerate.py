"""Data and reward models that say nothing: sides that are the same tokens, one prompt alone, rewards that do not vary."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import tiny_tokenizer
from tiny_scores import K, N, random_scores, reference
from tiny_workspace import policy_config

from prmd.config.policy import PolicySection
from prmd.errors import DataError
from prmd.models.loading import load_tokenizer, load_tokenizer_from
from prmd.models.tokenization import PrefixRow, say_one_prompt
from prmd.pairs import PreferencePair
from prmd.policies.notes import method_notes
from prmd.policies.pairs import PairTokens
from prmd.policies.targets import method_targets
from prmd.rewards.fitting import calibrate_reward_model
from prmd.rewards.task import RewardTask


def trimming(folder: Path) -> Any:
    """A tokenizer whose template trims what is said."""
    tiny_tokenizer(folder)
    tokenizer = load_tokenizer_from(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | trim"
    )
    return tokenizer


def pair(name: str, chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair(
        name, ({"role": "user", "content": f"why {name}"},), chosen, rejected, "mine", "helpful"
    )


def test_pairs_of_the_same_tokens_are_one_line_with_their_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = PairTokens(trimming(tmp_path), max_length=60, over_length="drop")
    long = pair("long", "fox " * 90, "dog")
    pairs = [pair("a", "a fox", "a dog"), pair("b", "dog", "dog "), pair("c", " fox", "fox"), long]
    with caplog.at_level(logging.WARNING, logger="prmd"):
        for _ in range(2):  # from memory too
            found = tokens.of_pairs(pairs)
    assert [one.id for one in found.pairs] == ["a"] and found.dropped == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and said[0].startswith(
        "2 of 4 pairs left out: chosen and rejected are the same tokens"
    )
    with pytest.raises(DataError, match="none of 2 pairs is left: 2 are the same tokens"):
        tokens.of_pairs(pairs[1:3])


def test_one_prompt_alone_is_said_before_the_training(caplog: pytest.LogCaptureFixture) -> None:
    same = [PrefixRow((1, 2, 3), ((4,), (5 + i,))) for i in range(6)]
    with caplog.at_level(logging.WARNING, logger="prmd"):
        say_one_prompt(same, "policies")
        say_one_prompt([*same, PrefixRow((1, 2), ((4,), (5,)))], "others")
        say_one_prompt(same[:1], "a single pair")
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("policies: all 6 pairs have one and the same prompt of 3 tokens")


@pytest.mark.parametrize("constant", [0, 2])
def test_a_reward_model_that_does_not_vary_is_refused_with_counts(tmp_path: Path, constant: int) -> None:
    shared = policy_config(tmp_path).reward_model_config

    def rewards(rows: list[PrefixRow], *, description: str) -> list[torch.Tensor]:
        values = [torch.randn(len(row.responses), 3, dtype=torch.float64) for row in rows]
        for found in values:
            found[:, constant] = 0.25
        return values

    model = SimpleNamespace(rewards=rewards, tokenizer=load_tokenizer(shared.model, shared.paths))
    task = RewardTask(shared, "helpful", "train", tmp_path / "rm", ())
    with pytest.raises(DataError) as refusal:
        calibrate_reward_model(task, model)
    said = str(refusal.value)
    assert "helpful" in said and "its rewards of 36 validation responses of 18 prompts give no scale" in said
    assert f"member {constant} gives all responses of a prompt the same reward" in said and "\n" not in said


def test_an_objective_that_rewards_both_sides_alike_is_said() -> None:
    scores = random_scores()
    flat = scores.rewards.clone()
    flat[2] = flat[2, :, :, :1]
    notes = method_notes(PolicySection(), "cvar", replace(scores, rewards=flat), torch.ones(N))
    assert f"honest rewards both sides of all {N} training pairs alike: nothing is learned from it" in notes
    assert not any("alike" in note for note in method_notes(PolicySection(), "cvar", scores, torch.ones(N)))
    labelled = replace(scores, rewards=flat, labelled_for=torch.arange(N) % K)
    found = method_targets(PolicySection(), "modpo", train=labelled, held_out=labelled, scale=reference())
    assert any("honest rewards both sides" in note for note in found.notes)

"""The pairs and tokens of a policy configuration as stage 3 makes them."""

from prmd.config.policy import PolicyConfig
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import TokenizedPairs
from prmd.policies.pairs import (
    Mixture,
    PairTokens,
    PolicyPairs,
    held_out_pairs,
    pooled_pairs,
    read_splits,
    training_mixture,
)


def tokens_of(config: PolicyConfig) -> PairTokens:
    """Nothing tokenized yet."""
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    training = config.training
    return PairTokens(tokenizer, max_length=training.max_length, over_length=training.over_length)


def mixture_of(config: PolicyConfig, objective: str | None = None) -> Mixture:
    """The mixture a method is trained on."""
    return training_mixture(config, read_splits(config.paths)["train"], objective)


def trained_on(config: PolicyConfig, objective: str | None = None) -> PolicyPairs:
    """The pairs a method is trained on."""
    train = read_splits(config.paths)["train"]
    return pooled_pairs(train, mixture_of(config, objective), tokens_of(config))


def watched(config: PolicyConfig, trained: int, objective: str | None = None) -> TokenizedPairs:
    """The held-out pairs beside a training of this many distinct pairs."""
    val = read_splits(config.paths)["val"]
    return held_out_pairs(val, mixture_of(config, objective), tokens_of(config), trained)

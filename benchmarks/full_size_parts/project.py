"""The project that the run at full size works on: an artifact root with a base model of random weights, pairs and settings.

Everything is as a user would have it: the base is a local folder that `model.name` names, the pairs are files of
`data.approach: own_pairs`, and the settings are those of `configs/` with the overrides below. The stages do the rest.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.side_by_side.setup import SEED, random_models, read_candidates
from benchmarks.side_by_side.shape import qwen_3b_shape
from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.loading import load_config
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.pairs import PreferencePair
from prmd.runtime import set_seed

TRAINED, BROUGHT = "harmless", "brief"
"""The two objectives: a reward model is trained for one, the reward of the other is `brevity.py`."""
METHOD = "hard_min"
MERGES = 8_000
"""Tokens of the tokenizer that are learnt from the pairs; the rest of a shape's vocabulary is there and never made."""
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """A shape and how much of everything it is given.

    Attributes:
        shape: of the base model.
        dtype: of its weights.
        pairs: at most, of both objectives together, before they are split.
        steps: optimizer steps of each training, about.
        pairs_per_step: of an optimizer step.
        prompts: that the reward model is calibrated on, 16 samples each.
        sampled_tokens: tokens at which a sample is cut; a random model ends none before.
        batch_size: responses sampled together.
    """

    shape: PreTrainedConfig
    dtype: torch.dtype
    pairs: int
    steps: int
    pairs_per_step: int
    prompts: int
    sampled_tokens: int
    batch_size: int


def tiny_shape() -> Qwen2Config:
    """Two layers of 32, for a run of all stages on a CPU."""
    return Qwen2Config(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


FULL_SHAPE, TINY_SHAPE = "qwen2.5-3b", "tiny"


def sizes() -> dict[str, Size]:
    """What `--shape` may name."""
    return {
        FULL_SHAPE: Size(qwen_3b_shape(), torch.bfloat16, 800, 12, 32, 8, 32, 128),
        TINY_SHAPE: Size(tiny_shape(), torch.float32, 160, 4, 8, 3, 4, 32),
    }


@dataclass(frozen=True)
class Project:
    """The settings of the run, by stage."""

    rewards: RewardModelConfig
    policies: PolicyConfig


def make_base(folder: Path, size: Size, texts: Sequence[str]) -> int:
    """Save random weights of a shape with a tokenizer that covers its vocabulary; bytes of the weights."""
    tokenizer = made_tokenizer(texts, size.shape.vocab_size)
    set_seed(SEED)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    shape = type(size.shape).from_dict(size.shape.to_dict() | ids)
    made = random_models(shape, dtype=size.dtype, checkpointing=False, pad_token_id=tokenizer.pad_token_id)
    made.policy().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def made_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, learnt from texts, in which every id of a vocabulary can be read.

    Nothing has to be fetched for it, and whatever a random model samples is text.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(MERGES, vocabulary),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    content = json.loads(bpe.to_str())
    known = content["model"]["vocab"]
    known |= {f"Ġ{i}": i for i in range(len(known), vocabulary)}  # no merge leads to them
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=[SPECIAL[1]],
        chat_template=TEMPLATE,
    )


def read_pairs(data: str | None, most: int) -> tuple[list[PreferencePair], str]:
    """Pairs in a random order, at most so many, and where they come from, in words.

    Args:
        data: as for `read_candidates`.
    """
    settings = load_config(CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig)
    pairs, source = read_candidates(data, settings.data)
    random.Random(SEED).shuffle(pairs)
    return pairs[:most], source


def texts_of(pairs: Sequence[PreferencePair]) -> list[str]:
    """Everything that is said in some pairs."""
    prompts = [message["content"] for pair in pairs for message in pair.prompt]
    return prompts + [text for pair in pairs for text in (pair.chosen, pair.rejected)]


def write_pairs(root: Path, pairs: Sequence[PreferencePair]) -> None:
    """One half of the pairs for each objective, as files that a user would bring."""
    for start, objective in enumerate((TRAINED, BROUGHT)):
        io.write_jsonl(_file(root, objective), [pair.to_row() for pair in pairs[start::2]])


def _file(root: Path, objective: str) -> Path:
    return root / f"{objective}.jsonl"


def settings_of(root: Path, size: Size, *, trained_on: int | None = None) -> Project:
    """The settings of `configs/` for this root.

    Args:
        trained_on: pairs of the train split of `TRAINED`, which decide the epochs; None before there is one.
    """
    wanted = size.steps * size.pairs_per_step
    shared = _shared(root, size)
    training = [f"training.pairs_per_step={size.pairs_per_step}", "training.checkpoints=[1.0]"]
    if size.pairs_per_step < 32:  # the accumulation in the YAML is that of 32
        training.append("training.gradient_accumulation_steps=2")
        training.append(f"training.pairs_per_device={size.pairs_per_step // 2}")
    epochs = [f"training.epochs={wanted / trained_on:.4f}"] if trained_on else []
    own = ["training.epochs=1.0", f"training.max_pairs={wanted}", f"policy.methods=[{METHOD}]"]
    referred = [f"reward_model_config.{text}" for text in (*shared, *training, *epochs)]
    return Project(
        load_config(
            CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig, [*shared, *training, *epochs]
        ),
        load_config(CONFIG_DIR / "policy_config.yaml", PolicyConfig, [*referred, *training, *own]),
    )


def _shared(root: Path, size: Size) -> list[str]:
    brevity = f"{Path(__file__).with_name('brevity.py').as_posix()}:brevity"
    objectives = {o: {"path": _file(root, o).as_posix()} for o in (TRAINED, BROUGHT)}
    values: dict[str, Any] = {
        "artifact_root": root.as_posix(),
        "report_to": [],
        "data.approach": "own_pairs",
        "data.own_pairs.objectives": objectives,
        "data.own_pairs.rewards": {BROUGHT: {"function": brevity}},
        "data.own_pairs.allow_code": True,
        "model.name": base_folder(root).as_posix(),
        "model.revision": None,
        "model.dtype": str(size.dtype).removeprefix("torch."),
        "calibration.prompts": size.prompts,
        "calibration.samples_per_prompt": 2,
        "calibration.max_new_tokens": size.sampled_tokens,
        "calibration.batch_size": size.batch_size,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def base_folder(root: Path) -> Path:
    """Where the base model of the run lies."""
    return root / "base"

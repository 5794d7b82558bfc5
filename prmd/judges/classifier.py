"""Any local text classifier as a judge: the probability of the one label that means toxic or harmful.

A folder or hub id in Hugging Face's format, of any size and architecture, with softmax labels, independent labels (sigmoid) or
one logit. Which label counts is found by its name or given. Probabilities are kept by content, and the model is loaded only
for what is not kept. Judging with them is in `text` and `toxicity`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths, find_user_path, places_tried
from prmd.errors import ConfigError, first_line
from prmd.inference.cache import KEY_BYTES, ScoreTable
from prmd.judges.chats import short_name
from prmd.models.identity import earlier_or_whole
from prmd.models.loading import load_labelled_classifier
from prmd.runtime import free_memory, progress

POSITIVE_LABELS = (
    "toxic",
    "toxicity",
    "unsafe",
    "harmful",
    "jailbreak",
    "hate",
    "hateful",
    "offensive",
    "yes",
)
"""Names that mean the bad outcome, the more telling first."""
TEXTS_PER_BATCH = 32
BATCHES_PER_SHARD = 16
LONGEST_TEXT_TOKENS = 4096


@dataclass(frozen=True)
class LabelClassifier:
    """A classifier by folder or hub id.

    Attributes:
        source: folder or hub id.
        label: the label that counts; None finds it by its name.
        key: where it is configured, for messages.
        paths: probabilities are cached below this artifact root.
        trust: whether code that comes with it may run, `model.trust_remote_code`.
    """

    source: str
    label: str | None
    key: str
    paths: ArtifactPaths
    trust: bool = False

    @property
    def name(self) -> str:
        return short_name(self.source)

    @cached_property
    def location(self) -> str:
        """The local folder if there is one, else the hub id."""
        folder = find_user_path(self.source, "folder")
        return self.source if folder is None else str(folder.resolve())

    @cached_property
    def fingerprint(self) -> str:
        """Key of the model (by content where it is local) and of the label."""
        model: Any = self.location
        if (folder := Path(self.location)).is_dir():
            counted = [
                p for p in sorted(folder.glob("*")) if p.suffix in (".safetensors", ".bin", ".json", ".txt")
            ]
            digests = zip(counted, io.files_sha256(counted), strict=True)
            earlier = [[path.name, digest] for path, digest in digests]
            model = earlier_or_whole(folder, self.paths, earlier=earlier)
        return io.fingerprint(["classifier", model, self.label])

    def probabilities(self, texts: Sequence[str], requests: Sequence[str] | None = None) -> np.ndarray:
        """P(label) of each text.

        Args:
            requests: what each text answers, read as the first of a pair; None where texts stand alone.

        Returns:
            [n] float64 in [0, 1].

        Raises:
            ConfigError: it cannot be loaded, or no label is known to count.
        """
        table = ScoreTable(self.paths.cache("labels", self.fingerprint), 1, model=self.source)
        inputs = [(t,) for t in texts] if requests is None else list(zip(requests, texts, strict=True))
        keys = [_key(texts) for texts in inputs]
        todo = {key: texts for key, texts in zip(keys, inputs, strict=True) if key not in table}
        if todo:
            self._fill(table, sorted(todo.items(), key=lambda kt: -sum(map(len, kt[1]))))
        return np.array([float(table[key][0]) for key in keys])

    def _fill(self, table: ScoreTable, todo: Sequence[tuple[bytes, tuple[str, ...]]]) -> None:
        try:
            model, tokenizer = load_labelled_classifier(self.location, trust=self.trust)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.key}: {self.source!r} cannot be loaded as a text classifier ({first_line(error)}; {places_tried(self.source)}); "
                "give its folder"
            ) from error
        index = self._index(model.config.id2label)
        batches = [todo[i : i + TEXTS_PER_BATCH] for i in range(0, len(todo), TEXTS_PER_BATCH)]
        fresh: list[tuple[bytes, Tensor]] = []
        for number, batch in enumerate(progress(batches, len(batches), f"{self.name}: classifying"), start=1):
            values = _label_probabilities(model, tokenizer, [texts for _, texts in batch], index)
            fresh += zip((key for key, _ in batch), values, strict=True)
            if number % BATCHES_PER_SHARD == 0 or number == len(batches):
                table.append([key for key, _ in fresh], torch.stack([value for _, value in fresh])[:, None])
                fresh = []
        del model
        free_memory()

    def _index(self, labels: dict[int, str]) -> int:
        names = {str(name).casefold(): int(index) for index, name in labels.items()}
        if self.label is not None:
            if self.label.casefold() not in names:
                raise ConfigError(
                    f"{self.key}: {self.source} has no label {self.label!r}, only {sorted(names)}"
                )
            return names[self.label.casefold()]
        if len(names) == 1:
            return 0
        for name in POSITIVE_LABELS:
            if name in names:
                return names[name]
        raise ConfigError(
            f"{self.key}: {self.source} has the labels {sorted(names)}, none of which says by its name that it means "
            "toxic or harmful; name it in label (scorer_label for the toxicity scorer)"
        )


def _key(texts: tuple[str, ...]) -> bytes:
    return hashlib.sha256(json.dumps(texts).encode("utf-8")).digest()[:KEY_BYTES]


@torch.inference_mode()
def _label_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, ...]],
    index: int,
) -> Tensor:
    """[n] probabilities of label `index`, float32 on the CPU; texts are cut to the model's context."""
    # RoBERTa's positions start behind its padding token, so two of them cannot be used.
    room = (getattr(model.config, "max_position_embeddings", None) or 514) - 2
    encoded = tokenizer(
        *(list(part) for part in zip(*texts, strict=True)),
        split_special_tokens=True,  # a response that spells one does not end what is judged
        truncation=True,
        max_length=min(room, tokenizer.model_max_length, LONGEST_TEXT_TOKENS),
        padding=True,
        return_tensors="pt",
    )
    logits = model(**encoded.to(next(model.parameters()).device)).logits.float()
    if logits.shape[1] == 1 or model.config.problem_type == "multi_label_classification":
        return logits[:, index].sigmoid().cpu()
    return logits.softmax(dim=-1)[:, index].cpu()

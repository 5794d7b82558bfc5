"""A trained reward model as the other stages use it: r_0, its ensemble and its calibration, scoring token rows.

The folder is a standard one-logit classifier with `ensemble.safetensors` (heads) or `members/` (adapters) and
`calibration.json` beside it. Training is in `train`; a plain hub classifier (a judge, say) is a reward model without ensemble.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.manifest import EVERYTHING
from prmd.artifacts.paths import ArtifactPaths, reward_model_command
from prmd.artifacts.runs import require_artifact, vouch_again
from prmd.config.shared import ModelConfig, SharedConfig
from prmd.errors import DataError
from prmd.inference.cache import ScoreTable
from prmd.inference.generation import GeneratedResponse, sample_rows
from prmd.inference.scoring import lookup, score_rows
from prmd.models.agreement import check_agreement
from prmd.models.bases import check_base
from prmd.models.chat_templates import read_template, template_fingerprint
from prmd.models.identity import model_files, weight_files
from prmd.models.loading import (
    base_model_key,
    load_classifier,
    load_folder_config,
    load_tokenizer_from,
)
from prmd.models.sequence_models import SequenceRewards, supports_shared_prompts
from prmd.models.tokenization import PrefixRow, Tokens, tokenize_texts
from prmd.pessimism.calibration import Calibration
from prmd.rewards.adapters import AdapterMembers, find_members
from prmd.rewards.brought import BROUGHT_FILE, BroughtReward, brought_reward
from prmd.rewards.heads import Ensemble
from prmd.runtime import free_memory

logger = logging.getLogger(__name__)

ENSEMBLE_FILE = "ensemble.safetensors"
CALIBRATION_FILE = "calibration.json"

Opened = tuple[PreTrainedModel | PeftModel, Callable[[dict[str, Tensor]], Tensor]]
"""A model in memory, and what it computes of a batch: [S, width]."""


@dataclass(frozen=True)
class RewardModel:
    """r_0 with its ensemble, ready to score.

    Attributes:
        ensemble: the M heads, or None for r_0 alone (M = 1) and for adapters.
        adapters: the M adapters, or None; they are scored on `base_model`.
        calibration: scale and offset per member, or None where none was stored.
        fingerprint: key of weights, ensemble, template and precision; names the cache table of rewards.
        backbone_fingerprint: the same without the ensemble; names the cache table of features.
        base_model: what it was trained from, and in which precision it is scored.
    """

    directory: Path
    tokenizer: PreTrainedTokenizerBase
    ensemble: Ensemble | None
    adapters: AdapterMembers | None
    calibration: Calibration | None
    fingerprint: str
    backbone_fingerprint: str
    paths: ArtifactPaths
    base_model: ModelConfig
    scoring_tokens: int

    @cached_property
    def model(self) -> PreTrainedModel:
        """The backbone with its head, loaded when something really has to be scored."""
        base = self.base_model
        return load_classifier(
            self.directory, base.dtype, attention=base.attention, trust=base.trust_remote_code
        )

    def release(self) -> None:
        """Free the memory of the weights."""
        self.__dict__.pop("model", None)
        free_memory()

    @property
    def members(self) -> int:
        members = self.ensemble or self.adapters
        return members.members if members else 1

    def rewards(self, rows: Sequence[PrefixRow], *, description: str) -> list[Tensor]:
        """Raw rewards r_m of every response of every row, cached by content.

        Args:
            rows: tokenised with `keep_suffix=True` by this model's template.

        Returns:
            One float64 [n_responses, M] tensor per row.
        """
        table = self._table("rewards", self.fingerprint, self.members)

        def values(features: Tensor, base: Tensor) -> Tensor:
            return self.ensemble.rewards(features, base) if self.ensemble else base[:, None]

        opened = self._open_adapters if self.adapters else lambda: self._open_backbone(values)
        return [found.double() for found in self._score(rows, opened, table, description)]

    def held(self, rows: Sequence[PrefixRow]) -> list[bool]:
        """Whether the rewards of every response of a row are in the cache."""
        table = self._table("rewards", self.fingerprint, self.members)
        return [table.holds([row]) for row in rows]

    def features(self, rows: Sequence[PrefixRow], *, description: str) -> list[Tensor]:
        """[r_0, h] of every response, cached: one float32 [n_responses, 1 + d] tensor per row."""
        config = load_folder_config(self.directory, trust=self.base_model.trust_remote_code)
        width = 1 + config.get_text_config().hidden_size
        table = self._table("features", self.backbone_fingerprint, width)

        def values(features: Tensor, base: Tensor) -> Tensor:
            return torch.cat([base[:, None], features], dim=1)

        return self._score(rows, lambda: self._open_backbone(values), table, description)

    def _table(self, kind: str, fingerprint: str, width: int) -> ScoreTable:
        return ScoreTable(self.paths.cache(kind, fingerprint), width, model=str(self.directory))

    def _open_backbone(self, values: Callable[[Tensor, Tensor], Tensor]) -> Opened:
        scorer = SequenceRewards(self.model).eval()
        return self.model, lambda batch: values(*scorer.features_and_rewards(**batch))

    def _open_adapters(self) -> Opened:
        self.release()  # one base in memory at a time
        scorer = self.adapters.load(self.base_model, self.paths, pad_token_id=self.tokenizer.pad_token_id)
        return scorer.model, lambda batch: scorer.rewards(**batch)

    def _score(
        self,
        rows: Sequence[PrefixRow],
        opened: Callable[[], Opened],
        table: ScoreTable,
        description: str,
    ) -> list[Tensor]:
        if table.holds(rows):
            return [lookup(table, row) for row in rows]
        model, compute = opened()
        longest = max(row.longest for row in rows)
        check_agreement(model, SequenceRewards(model), longest=longest)
        return score_rows(
            rows,
            compute,
            table=table,
            pad_id=self.tokenizer.pad_token_id,
            tokens_per_batch=self.scoring_tokens,
            share_prompt=supports_shared_prompts(model.config, longest),
            device=model.device,
            description=description,
        )


Scorer = RewardModel | BroughtReward
"""What gives the rewards of an objective; the rows it reads are its own."""


def rows_of_samples(
    model: RewardModel, prompts: Sequence[Tokens], responses: Sequence[Sequence[GeneratedResponse]]
) -> list[PrefixRow]:
    """Rows of prompts and samples as a reward model reads them: by the text of a response (`tokenize_texts`).

    Earlier versions read the sampled ids, which are mostly the same. Where one kept the rewards of all samples of a prompt they
    are finished and count as they are; that control tokens were read within such samples is said.
    """
    directory = model.paths.cache("rewards", model.fingerprint)
    table, control = ScoreTable(directory, model.members), read_template(model.tokenizer).control_ids
    rows, misread = [], 0
    sampled = sample_rows(prompts, responses, model.tokenizer, keep_suffix=True)
    for prompt, samples, earlier in zip(prompts, responses, sampled, strict=True):
        said = (token for s in samples for token in s.token_ids[: len(s.token_ids) - s.finished])
        kept, controlled = table.holds([earlier]), not control.isdisjoint(said)
        rows.append(earlier)
        if controlled or not kept:
            read = tokenize_texts(model.tokenizer, prompt, [s.text for s in samples])
            misread += kept and read != earlier
            rows[-1] = earlier if kept else read
    if misread:
        logger.info(
            "%s: an earlier version scored samples with control tokens within them, of %d prompts, as if turns ended or began "
            "there; delete this folder to have all samples scored by their text",
            *(directory, misread),
        )
    return rows


def load_reward_model(directory: Path, *, shared: SharedConfig) -> RewardModel:
    """Load a reward model's folder.

    Raises:
        DataError: no weights, or a calibration that belongs to other ones; a missing head when it first scores.
    """
    base, paths = shared.model, shared.paths
    tokenizer = load_tokenizer_from(directory, trust=base.trust_remote_code)
    ensemble_file = directory / ENSEMBLE_FILE
    ensemble = Ensemble.load(ensemble_file) if ensemble_file.is_file() else None
    adapters = find_members(directory)
    rest = [template_fingerprint(tokenizer), base.dtype]
    keys = [io.fingerprint([key, *rest]) for key in weights_keys(directory, paths)]
    if adapters:
        keys[0] = io.fingerprint([keys[0], base_model_key(base, paths)])
    return RewardModel(
        directory=directory,
        tokenizer=tokenizer,
        ensemble=ensemble,
        adapters=adapters,
        calibration=read_calibration(directory, keys[0]),
        fingerprint=keys[0],
        backbone_fingerprint=keys[1],
        paths=paths,
        base_model=base,
        scoring_tokens=shared.scoring_tokens,
    )


def load_reward_models(shared: SharedConfig) -> list[Scorer]:
    """The finished, calibrated reward models of all objectives, in their order; weights are not loaded yet.

    Raises:
        ConfigError: the function of a brought reward cannot be loaded.
        DataError: one is missing (with the command that trains it), uncalibrated, of another ensemble size, calibrated on
            other data, or trained where it is brought now, or the other way round.
    """
    found: list[Scorer] = []
    for objective in shared.paths.objectives:
        directory = shared.paths.reward_model(objective)
        command = reward_model_command(objective)
        what = f"the {objective} reward model"
        require_artifact(directory, what=what, command=command, read=EVERYTHING)
        model: Scorer
        if objective in shared.data.brought:
            model = load_brought(directory, objective, shared=shared)
        else:
            _refuse_brought(directory, what, command)
            check_base(directory, shared.model, shared.paths, what=what, command=command)
            model = load_reward_model(directory, shared=shared)
        if model.calibration is None:
            raise DataError(f"{directory}: no calibration.json; make it with `{command} --force`")
        check_calibration(model, shared.calibration.source)
        if len(model.calibration.scale) != model.members:
            raise DataError(
                f"{directory}/calibration.json: {len(model.calibration.scale)} members, the ensemble has {model.members}; "
                f"make it again with `{command} --force`"
            )
        found.append(model)
    return _side_by_side(shared, found)


def _side_by_side(shared: SharedConfig, found: Sequence[Scorer]) -> list[Scorer]:
    """Models of one ensemble size; what is brought is repeated to that size.

    Raises:
        DataError: ensembles of different size.
    """
    sizes = {
        objective: model.members
        for objective, model in zip(shared.paths.objectives, found, strict=True)
        if isinstance(model, RewardModel)
    }
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"reward models have ensembles of different size {sizes}; train them with one ensemble.members"
        )
    members = max(sizes.values(), default=1)
    return [model if isinstance(model, RewardModel) else model.repeated(members) for model in found]


def load_brought(directory: Path, objective: str, *, shared: SharedConfig) -> BroughtReward:
    """Load a brought reward, its calibration included, and see that it is still the one that was calibrated.

    Raises:
        ConfigError: its function cannot be loaded.
        DataError: a model was trained there, or the function's file or the columns have changed since.
    """
    reward, path = brought_reward(shared, objective, directory), directory / BROUGHT_FILE
    again = f"run `{reward_model_command(objective)} --force`"
    if not path.is_file():
        raise DataError(
            f"{directory}: holds a trained reward model, and data.own_pairs.rewards brings the rewards of {objective}; {again}"
        )
    kept = io.read_json(path)
    if kept["fingerprint"] != reward.fingerprint:
        changed = (
            "its file has changed since" if kept.get("function") == reward.source.function else "wanted it"
        )
        named = reward.source.function or f"{reward.source.column_chosen}, {reward.source.column_rejected}"
        raise DataError(f"{path}: not calibrated for {named} as it is now ({changed}); {again}")
    return replace(reward, calibration=read_calibration(directory, reward.fingerprint))


def _refuse_brought(directory: Path, what: str, command: str) -> None:
    if (directory / BROUGHT_FILE).is_file():
        raise DataError(
            f"{what} is a reward that was brought ({directory}), and data.own_pairs.rewards names none now; train one with: "
            f"{command} --force"
        )


def weights_keys(directory: Path, paths: ArtifactPaths) -> tuple[str, str]:
    """Content keys of a reward model's folder: of all, its ensemble included, and of what is there without it.

    Args:
        paths: as for `identity.model_files`.

    Raises:
        DataError: it holds no weights.
    """
    if {name for name, _ in weight_files(directory)} == {ENSEMBLE_FILE}:
        raise DataError(
            f"{directory}: {ENSEMBLE_FILE} without a model beside it; give a trained reward model"
        )
    files, adapters = model_files(directory, paths), find_members(directory)
    backbone = [file for file in files if file[0] != ENSEMBLE_FILE]
    return io.fingerprint(files + (adapters.keys() if adapters else [])), io.fingerprint(backbone)


def read_calibration(directory: Path, fingerprint: str) -> Calibration | None:
    """The stored calibration, or None.

    Raises:
        DataError: it was made for other weights or another template.
    """
    path = directory / CALIBRATION_FILE
    if not path.is_file():
        return None
    record = io.read_json(path)
    if record["reward_model"] != fingerprint:
        raise DataError(
            f"{path}: belongs to reward model {record['reward_model']}, this folder is {fingerprint} "
            f"(weights, template or model.dtype differ); run its training script again with --force"
        )
    return Calibration.from_json(record["calibration"])


def check_calibration(reward_model: Scorer, source: str) -> None:
    """Refuse a calibration that is not that of this configuration.

    Args:
        source: `calibration.source` of the configuration.

    Raises:
        DataError: it was fitted on responses from elsewhere, or on pairs that have been prepared anew.
    """
    path = reward_model.directory / CALIBRATION_FILE
    record, paths = io.read_json(path), reward_model.paths
    again = "run its training script again with --force"
    if record["source"] != source:
        raise DataError(
            f"{path}: fitted on {record['source']}, calibration.source is {source}; set that, or {again}"
        )
    if record["data"] != _validation_key(paths):
        raise DataError(
            f"{path}: fitted on other validation pairs than those below {paths.processed}, which were prepared "
            f"anew; {again}"
        )


def write_calibration(reward_model: Scorer, calibration: Calibration, *, source: str) -> None:
    """Store a calibration with the keys of what it belongs to: model, template, source and validation pairs."""
    trained = isinstance(reward_model, RewardModel)
    record = {
        "reward_model": reward_model.fingerprint,
        "template": template_fingerprint(reward_model.tokenizer) if trained else None,
        "data": _validation_key(reward_model.paths),
        "source": source,
        "calibration": calibration.to_json(),
    }
    vouch_again(io.write_json(reward_model.directory / CALIBRATION_FILE, record))


def _validation_key(paths: ArtifactPaths) -> str:
    """A key of the validation pairs of all objectives, whose prompts a calibration is fitted on."""
    files = [paths.split(objective, "val") for objective in paths.objectives]
    return io.fingerprint([io.file_sha256(file) if file.is_file() else None for file in files])

"""Members that are LoRA adapters, and reward models that share one base in memory.

    r_m(x, y) = the reward of the base with adapter and head m,   m = 0 .. M - 1

Every member has its own Poisson bootstrap of the training pairs (that of `heads.bootstrap_weights`) and its own seed, which
draws the start of adapter and head and the order of batches. r_0 is none of them: it is trained on all pairs, each once.

A reward model trained as an adapter is saved merged, W + s B A rounded to its number format, with the adapter beside it.
`SharedBase` loads the base once and attaches every objective's adapter to it; a layer of the one that is switched on adds
s B A to its weight when it is called, with the same rounding. Rewards are therefore those of the merged checkpoint, under
the same cache keys and the same calibration, in bfloat16 too, where the usual sum W x + s B (A x) would differ from them.

What it saves is reading: K - 1 of K checkpoints never come from disk (nor, on a GPU, are copied to it). The peak of memory
is one base and K adapters, no less than the one checkpoint that is in memory otherwise. Scoring itself is slower, by the
product B A and the sum of each layer in every batch: on one CPU core SmolLM2-135M with r = 16 takes 3.8 s and not 3.3 s for
a batch of 1,017 tokens, less at more tokens a batch, and attaching three adapters 1.7 s where its three checkpoints, small
and in the system's file cache, are mapped in 0.25 s. It is meant for checkpoints of gigabytes, where it has not been
measured.
"""

import functools
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor
from torch.func import functional_call

from prmd.artifacts import io
from prmd.artifacts.manifest import remember
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.models.loading import (
    load_adapted,
    load_base_classifier,
    load_folder_config,
    load_model_config,
    load_tokenizer,
)
from prmd.models.sequence_models import SequenceRewards
from prmd.pairs import PreferencePair, hash_share
from prmd.rewards.heads import bootstrap_weights
from prmd.runtime import free_memory
from prmd.training.checkpoints import copy_model, drop_checkpoints, remember_trained

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"


class SharedBase:
    """One base model in memory with the adapters of several reward models, one of them switched on at a time.

    Args:
        directories: folders of the reward models, as `models.loading.save_merged` leaves them.
    """

    def __init__(self, model: ModelConfig, paths: ArtifactPaths, directories: Sequence[Path]) -> None:
        self._base, self._paths = model, paths
        self._names = {directory: f"adapter{i}" for i, directory in enumerate(directories)}

    @cached_property
    def _model(self) -> PeftModel | None:
        model = self._load()
        for directory, name in self._names.items():
            model.set_adapter(name)
            if not _is_checkpoint(model, directory):
                logger.warning(
                    "%s: its adapter on %s is not its checkpoint; checkpoints are loaded one by one",
                    *(directory, self._base.name),
                )
                return None
        logger.info("%d reward models are adapters of one base, which is loaded once", len(self._names))
        return model

    def _load(self) -> PeftModel:
        tokenizer = load_tokenizer(self._base, self._paths)
        folders = {name: directory for directory, name in self._names.items()}
        model = load_adapters(self._base, self._paths, folders, pad_token_id=tokenizer.pad_token_id)
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            layer.forward = functools.partial(_merged_linear, layer)
        return model

    def switch_to(self, directory: Path) -> PeftModel | None:
        """The base with the adapter of one reward model, until the next call; None where checkpoints are needed."""
        if self._model is not None:
            self._model.set_adapter(self._names[directory])
        return self._model

    def release(self) -> None:
        """Free the memory of the base and the adapters."""
        self.__dict__.pop("_model", None)
        free_memory()


def load_adapters(
    model: ModelConfig, paths: ArtifactPaths, folders: Mapping[str, Path], *, pad_token_id: int
) -> PeftModel:
    """One base classifier in memory with adapters attached to it, for scoring.

    Args:
        folders: by the adapter's name, what holds it in `adapter/`.
    """
    adapted = load_base_classifier(model, paths, pad_token_id=pad_token_id)
    for name, folder in folders.items():
        adapted = load_adapted(adapted, folder / ADAPTER_FOLDER, name=name)
    return adapted.eval()


def shared_base(model: ModelConfig, paths: ArtifactPaths, directories: Sequence[Path]) -> SharedBase | None:
    """What scores the reward models in `directories` on one base, or None where they are no adapters of one.

    A base that is stored in another number format than `model.dtype` would be rounded before an adapter is added to it,
    and not after; such reward models are loaded merged.
    """
    if len(directories) < 2 or not all(
        (d / ADAPTER_FOLDER / "adapter_config.json").is_file() for d in directories
    ):
        return None
    formats = {
        load_model_config(model, paths).dtype,
        *(load_folder_config(d, trust=model.trust_remote_code).dtype for d in directories),
    }
    return SharedBase(model, paths, directories) if formats == {getattr(torch, model.dtype)} else None


def _merged_weight(layer: LoraLayer) -> Tensor:
    """W + s B A of the adapter that is on, added in float32 and rounded once, as merging does."""
    weight = layer.get_base_layer().weight
    [name] = layer.active_adapters
    return (weight.float() + layer.get_delta_weight(name)).to(weight.dtype)


def _merged_linear(layer: LoraLayer, x: Tensor) -> Tensor:
    return functional_call(layer.get_base_layer(), {"weight": _merged_weight(layer)}, (x,))


def _is_checkpoint(model: PeftModel, directory: Path) -> bool:
    """Whether the first and the last adapted layer and the head are those of the merged checkpoint, but for rounding.

    It refuses another base, another revision of it, and an adapter that does not belong to the checkpoint.
    """
    network = model.get_base_model()
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer)]
    ours = {f"{name}.weight": _merged_weight(layer) for name, layer in (layers[0], layers[-1])}
    ours["score.weight"] = network.score.modules_to_save[model.active_adapter].weight
    stored = _stored(directory, list(ours))
    return all(name in stored and _equal(weight, stored[name]) for name, weight in ours.items())


def _stored(directory: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The named weights of a checkpoint, without reading the others."""
    found: dict[str, Tensor] = {}
    for path in directory.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in set(names) & set(stored.keys())}
    return found


def _equal(ours: Tensor, stored: Tensor) -> bool:
    """Whether all but one in a thousand entries agree to 1e-6 of the largest.

    Another device sums B A in another order, which moves 1 in 30,000 of bfloat16 weights to a neighbour.
    """
    if (ours.shape, ours.dtype) != (stored.shape, stored.dtype):
        return False
    off = (ours.float().cpu() - stored.float()).abs() > 1e-6 * stored.float().abs().max()
    return float(off.float().mean()) <= 1e-3


MEMBERS_FOLDER = "members"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterMembers:
    """The adapters of one reward model.

    Attributes:
        directories: `members/0`, `members/1`, ...; the adapter with its head lies in `adapter/` of each.
    """

    directories: tuple[Path, ...]

    @property
    def members(self) -> int:
        return len(self.directories)

    def keys(self) -> list[list[str]]:
        """Keys of weights and scaling of every adapter, in the order of the members."""
        adapters = [directory / ADAPTER_FOLDER for directory in self.directories]
        keys = io.files_sha256([a / name for a in adapters for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)])
        return [list(pair) for pair in zip(keys[::2], keys[1::2], strict=True)]

    def load(self, model: ModelConfig, paths: ArtifactPaths, *, pad_token_id: int) -> "AdapterScorer":
        """One base in memory with all adapters attached to it."""
        folders = {f"member-{number}": directory for number, directory in enumerate(self.directories)}
        adapted = load_adapters(model, paths, folders, pad_token_id=pad_token_id)
        return AdapterScorer(adapted, SequenceRewards(adapted).eval(), tuple(folders))


@dataclass(frozen=True)
class AdapterScorer:
    """A base with M adapters, one of which is switched on at a time."""

    model: PeftModel
    scorer: SequenceRewards
    names: tuple[str, ...]

    def rewards(self, **batch: Tensor) -> Tensor:
        """r_m [S, M] float32 of the responses of a batch, one member after the other."""
        found = []
        for name in self.names:
            self.model.set_adapter(name)
            found.append(self.scorer(**batch))
        return torch.stack(found, dim=1)


def find_members(directory: Path) -> AdapterMembers | None:
    """The adapters in a reward model's folder, or None where its ensemble, if any, is of heads."""
    found = directory.glob(f"{MEMBERS_FOLDER}/*/{ADAPTER_FOLDER}/{ADAPTER_CONFIG}")
    folders = sorted((path.parents[1] for path in found), key=lambda path: int(path.name))
    return AdapterMembers(tuple(folders)) if folders else None


def member_folder(directory: Path, member: int) -> Path:
    """Where a member of the reward model in `directory` lies."""
    return directory / MEMBERS_FOLDER / str(member)


def is_trained(folder: Path) -> bool:
    """Whether the member in this folder is finished: its adapter appears whole, and last."""
    return (folder / ADAPTER_FOLDER / ADAPTER_CONFIG).is_file()


def member_seed(seed: int, member: int) -> int:
    """Seed of a member's adapter, head and order of batches; far from the seeds of other runs, which are often 42, 43, ..."""
    return int(2**31 * hash_share(f"ensemble-member-{seed}", str(member)))


def resampled(pairs: Sequence[PreferencePair], *, members: int, seed: int) -> list[list[PreferencePair]]:
    """The pairs each member is trained on: pair i as often as its Poisson(1) weight w_{m,i} says."""
    counts = bootstrap_weights([pair.id for pair in pairs], members, seed).int().tolist()
    return [[pair for pair, count in zip(pairs, row, strict=True) for _ in range(count)] for row in counts]


def keep_adapter(folder: Path, best: Path) -> None:
    """Make the best checkpoint the member of this folder; what an interrupted call left undone, the next one does."""
    partial = folder / f".{ADAPTER_FOLDER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    copy_model(best, partial)
    values = io.read_json(partial / ADAPTER_CONFIG)
    base = Path(values.get("base_model_name_or_path") or "")
    if base.is_absolute():  # a path that holds on this machine alone
        io.write_json(partial / ADAPTER_CONFIG, values | {"base_model_name_or_path": base.name})
    io.publish_directory(partial, folder / ADAPTER_FOLDER)
    remember(folder, [path for path in sorted(folder.glob(f"{ADAPTER_FOLDER}/*")) if path.is_file()])
    remember_trained(folder)
    drop_checkpoints(folder)

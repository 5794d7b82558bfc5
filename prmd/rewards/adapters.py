"""Members that are LoRA adapters of one base in memory.

    r_m(x, y) = the reward of the base with adapter and head m,   m = 0 .. M - 1

Every member has its own Poisson bootstrap of the training pairs (that of `heads.bootstrap_weights`) and its own seed, which
draws the start of adapter and head and the order of batches. r_0 is none of them: it is trained on all pairs, each once.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from prmd.artifacts import io
from prmd.artifacts.manifest import remember
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.models.loading import forget_local_base, load_adapted, load_base_classifier
from prmd.models.sequence_models import SequenceRewards
from prmd.pairs import PreferencePair, hash_share
from prmd.rewards.heads import bootstrap_weights
from prmd.training.checkpoints import copy_model, drop_checkpoints, remember_trained

ADAPTER_FOLDER = "adapter"
MEMBERS_FOLDER = "members"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    forget_local_base(partial / ADAPTER_CONFIG)
    io.publish_directory(partial, folder / ADAPTER_FOLDER)
    remember(folder, [path for path in sorted(folder.glob(f"{ADAPTER_FOLDER}/*")) if path.is_file()])
    remember_trained(folder)
    drop_checkpoints(folder)

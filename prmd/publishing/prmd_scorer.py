"""Scores with a published reward model: its ensemble, its calibration and the pessimistic R.

Needs torch and transformers, and peft where the ensemble is of adapters.

    from prmd_scorer import Scorer
    scorer = Scorer("FOLDER")
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    print(scorer.calibrated([talk]))   # one row per conversation, one column per member
    print(scorer.pessimistic([talk]))  # the lowest member, in calibrated units

Rewards are comparable between responses to one prompt; the same prompt with its responses makes a fair comparison.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Scorer:
    """A published reward model in memory.

    Args:
        folder: a local copy of what was published (`huggingface_hub.snapshot_download` fetches one).
        device: where it computes, such as "cuda".
        base: folder or hub id of the base that adapters were trained from; None: the hub id in `scoring.json`.
    """

    def __init__(self, folder: str, device: str = "cpu", base: str | None = None) -> None:
        place = Path(folder)
        self.facts = json.loads((place / "scoring.json").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        found = place.glob("members/*/adapter")
        adapters = sorted(found, key=lambda path: int(path.parent.name))
        self.members = [f"member-{number}" for number in range(len(adapters))]
        self.heads: dict[str, Tensor] = {}
        if adapters:
            self.model = self._adapted(adapters, base, device)
            return
        self.model = self._classifier(folder, device)
        if (place / "ensemble.safetensors").is_file():
            with safe_open(place / "ensemble.safetensors", framework="pt", device=device) as file:
                self.heads = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def _classifier(self, source: str, device: str, **arguments: Any) -> Any:
        dtype = getattr(torch, self.facts["dtype"])
        model = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, trust_remote_code=False, **arguments
        )
        return model.eval().to(device)

    def _adapted(self, adapters: Sequence[Path], base: str | None, device: str) -> Any:
        """The base, whose own head is never used, with every member's adapter and head."""
        from peft import PeftModel

        own, revision = self.facts.get("base"), self.facts.get("revision") if base is None else None
        if base is None and own is None:
            raise ValueError(
                "these adapters' base is not on the hub: give its folder, Scorer(folder, base=...)"
            )
        source = base or own
        network = self._classifier(source, device, num_labels=1, revision=revision or "main")
        model = PeftModel.from_pretrained(network, adapters[0], adapter_name=self.members[0])
        for name, adapter in list(zip(self.members, adapters, strict=True))[1:]:
            model.load_adapter(adapter, adapter_name=name)
        return model.eval().to(device)

    def rewards(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Tensor:
        """Raw rewards of every member, [S, M] float64, M = 1 without an ensemble."""
        with torch.no_grad():
            return torch.cat([self._rewards(conversation) for conversation in conversations]).double()

    def _rewards(self, conversation: Sequence[Mapping[str, str]]) -> Tensor:
        text = self.tokenizer.apply_chat_template(list(conversation), tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        ids = ids.to(self.model.device)
        if self.members:
            return torch.cat([self._member(name, ids) for name in self.members], dim=1)
        feature = self._feature(self.model, ids)
        base = self._score(self.model.score, feature)
        return base + self._heads(feature) if self.heads else base

    def _member(self, name: str, ids: Tensor) -> Tensor:
        self.model.set_adapter(name)
        network = self.model.get_base_model()
        return self._score(network.score.modules_to_save[name], self._feature(network, ids))

    def _feature(self, network: Any, ids: Tensor) -> Tensor:
        backbone = getattr(network, network.base_model_prefix)
        return backbone(ids).last_hidden_state[:, -1].float()

    def _score(self, head: Any, feature: Tensor) -> Tensor:
        bias = getattr(head, "bias", None)
        return feature @ head.weight.float().T + (0.0 if bias is None else bias.float())

    def _heads(self, feature: Tensor) -> Tensor:
        w = self.heads
        hidden = torch.einsum("sd,mdh->msh", (feature - w["mean"]) / w["std"], w["weight1"])
        hidden = (hidden + w["bias1"][:, None]).relu() @ w["weight2"] + w["bias2"][:, None]
        return (hidden.relu() @ w["weight3"] + w["bias3"][:, None]).squeeze(-1).T

    def calibrated(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Tensor:
        """(reward - offset) / scale of every member, [S, M] float64."""
        found = self.facts["calibration"]
        if found is None:
            raise ValueError("this model was published without a calibration; use rewards()")
        offset, scale = (torch.tensor(found[key], dtype=torch.float64) for key in ("offset", "scale"))
        return (self.rewards(conversations).cpu() - offset) / scale

    def pessimistic(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Tensor:
        """R = min over members of the calibrated rewards, [S]; over objectives take the minimum of their scorers."""
        return self.calibrated(conversations).amin(dim=1)

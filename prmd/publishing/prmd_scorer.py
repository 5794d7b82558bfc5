"""Scores with a published reward model: its ensemble, its calibration and the pessimistic R. Needs torch and transformers.

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

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Scorer:
    """A published reward model in memory.

    Args:
        folder: a local copy of what was published (`huggingface_hub.snapshot_download` fetches one).
        device: where it computes, such as "cuda".
    """

    def __init__(self, folder: str, device: str = "cpu") -> None:
        place = Path(folder)
        self.facts = json.loads((place / "scoring.json").read_text(encoding="utf-8"))
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        dtype = getattr(torch, self.facts["dtype"])
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False
        )
        self.model = model.eval().to(device)
        self.heads: dict[str, Tensor] = {}
        if (place / "ensemble.safetensors").is_file():
            with safe_open(place / "ensemble.safetensors", framework="pt", device=device) as file:
                self.heads = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def rewards(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> Tensor:
        """Raw rewards of every member, [S, M] float64, M = 1 without an ensemble."""
        with torch.no_grad():
            return torch.cat([self._rewards(conversation) for conversation in conversations]).double()

    def _rewards(self, conversation: Sequence[Mapping[str, str]]) -> Tensor:
        text = self.tokenizer.apply_chat_template(list(conversation), tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        backbone = getattr(self.model, self.model.base_model_prefix)
        feature = backbone(ids.to(self.model.device)).last_hidden_state[:, -1].float()
        bias = getattr(self.model.score, "bias", None)
        base = feature @ self.model.score.weight.float().T + (0.0 if bias is None else bias.float())
        return base + self._heads(feature) if self.heads else base

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

"""The model card of what is published: made of its records, with intervals, licenses, limits and how to load it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmd.errors import ConfigError

_HH = ("[HH-RLHF](https://huggingface.co/datasets/Anthropic/hh-rlhf)", "MIT")
_TRUTHFULQA = ("[TruthfulQA](https://huggingface.co/datasets/truthfulqa/truthful_qa)", "Apache-2.0")
_PKU = ("[PKU-SafeRLHF](https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF)", "CC-BY-NC-4.0")
_EMBEDDED = ("examples that come with the project", "the project's own, Apache-2.0")
_EQUATIONS = {
    "reward_model": "Bradley-Terry: -log sigma(r(x, y_chosen) - r(x, y_rejected)), with a small centering term",
    "baseline_dpo": "DPO on the labels: -log sigma(beta * (log-ratio of chosen - log-ratio of rejected))",
    "other": "the policy's log-ratio margin beta * (h(y_1) - h(y_2)) is regressed on, or trained towards, the margin of the "
    "pessimistic reward R = across_k(within_m(r[k, m])) of all objectives k and ensemble members m",
}
_SCORE = """```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{here}")
model = AutoModelForSequenceClassification.from_pretrained("{here}")
text = tokenizer.apply_chat_template(messages, tokenize=False)  # the response is the last message
reward = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
```"""
_ENSEMBLE = """The whole ensemble, with `prmd_scorer.py` from this folder:

```python
from prmd_scorer import Scorer
scorer = Scorer("FOLDER")  # a local copy of this repository
print(scorer.calibrated([messages]))  # every member, in calibrated units
print(scorer.pessimistic([messages]))  # R, the lowest of them
```"""
_MEMBERS = """That is r_0. The ensemble is the adapters in `members/`, on the base model; with `prmd_scorer.py` from this folder, which
needs torch, transformers and peft:

```python
from prmd_scorer import Scorer
scorer = Scorer("FOLDER"{base})  # a local copy of this repository
print(scorer.calibrated([messages]))  # every member, in calibrated units
print(scorer.pessimistic([messages]))  # R, the lowest of them
```"""
_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")
```"""
_POLICY = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{here}")
tokenizer = AutoTokenizer.from_pretrained("{here}")
```"""


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        kind: `reward_model`, `policy` or `judge`.
        name: objective or method.
        here: how a reader names what was published.
        base: hub id of the base, or the name of its local folder.
        is_hub_base: whether a stranger can fetch the base by that name.
        base_license: what the base's own card states (`records.base_license`).
        license: what the user gives for own pairs; else None.
        evaluation: of a policy, what `compute_metrics` measured of these very weights; None where it has not.
    """

    kind: str
    name: str
    here: str
    base: str
    is_hub_base: bool
    base_license: list[str]
    revision: str | None
    approach: str
    metrics: dict[str, Any]
    record: dict[str, Any]
    command: str
    license: str | None
    evaluation: dict[str, Any] | None
    is_adapter: bool
    has_ensemble: bool
    has_members: bool


def licensed_data(facts: Facts) -> list[tuple[str, str]]:
    """(data, license) of everything it was trained on.

    Raises:
        ConfigError: own pairs, whose license nobody has given.
    """
    if facts.approach == "own_pairs":
        if facts.license is None:
            raise ConfigError("--license: got none, wanted the license of your own pairs, such as cc-by-4.0")
        return [("the author's own preference pairs", facts.license)]
    if facts.approach == "embedded":
        return [_EMBEDDED]
    honest = _PKU if facts.approach == "pku_safe" else _TRUTHFULQA
    objectives = {
        "helpful": _PKU if facts.approach == "pku_safe" else _HH,
        "harmless": _PKU if facts.approach == "pku_safe" else _HH,
        "honest": honest,
    }
    own = [objectives[facts.name]] if facts.kind != "policy" else objectives.values()
    return list(dict.fromkeys(own))


def model_card(facts: Facts) -> str:
    """The text of README.md.

    Raises:
        ConfigError: as `licensed_data`.
    """
    data = licensed_data(facts)
    parts = [
        _head(facts, data),
        f"# {facts.name} ({facts.kind.replace('_', ' ')})",
        _method(facts),
        "## How to load\n\n" + _loading(facts),
        "## Measured\n\n" + (_evaluated(facts) if facts.kind == "policy" else _measured(facts.metrics)),
        "## Data and licenses\n\n" + _licenses(facts, data),
        "## Limits\n\n" + _limits(facts),
        "## Made by\n\n" + _made_by(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _head(facts: Facts, data: list[tuple[str, str]]) -> str:
    licenses = [license_ for _, license_ in data]
    own = facts.license if facts.approach == "own_pairs" else "other"
    chosen = "cc-by-nc-4.0" if "CC-BY-NC-4.0" in licenses else own
    task = "text-generation" if facts.kind == "policy" else "text-classification"
    lines = ["---", f"license: {chosen}", f"pipeline_tag: {task}"]
    lines += [f"library_name: {'peft' if facts.is_adapter else 'transformers'}"]
    lines += [f"base_model: {facts.base}"] if facts.is_hub_base else []
    return "\n".join([*lines, "---"])


def _method(facts: Facts) -> str:
    key = facts.name.split("-")[0] if facts.kind == "policy" else "reward_model"
    equation = _EQUATIONS.get(key, _EQUATIONS["other"])
    local = "" if facts.is_hub_base else " (of its author's machine, not on the hub by this name: ask for it)"
    revision = f" at revision {facts.revision}" if facts.revision else ""
    notes = "".join(f"\n- {note}" for note in facts.metrics.get("notes", []))
    lines = [f"- base model: {facts.base}{revision}{local}", f"- method: {facts.name}, {equation}"]
    return "\n".join(lines) + notes


def _loading(facts: Facts) -> str:
    if facts.kind == "policy":
        return (_ADAPTER if facts.is_adapter else _POLICY).format(base=facts.base, here=facts.here)
    text = _SCORE.format(here=facts.here)
    if facts.has_members:
        base = "" if facts.is_hub_base else ', base="FOLDER OF THE BASE"'
        return f"{text}\n\n{_MEMBERS.format(base=base)}"
    return f"{text}\n\n{_ENSEMBLE}" if facts.has_ensemble else text


def _licenses(facts: Facts, data: list[tuple[str, str]]) -> str:
    base = "no card of it states a license here; look for it before you use what is made of it"
    if facts.base_license:
        license_, *more = facts.base_license
        base = f"{' '.join([license_, *(f'({one})' for one in more)])}, by its own card"
    return "\n".join([f"- base model {facts.base}: {base}", *(f"- {what}: {name}" for what, name in data)])


def _evaluated(facts: Facts) -> str:
    """What judges say of a policy's samples, in intervals over prompts; or that nobody has asked them."""
    found = facts.evaluation
    if found is None:
        return "Not evaluated yet: there are no results of these weights. Judge it on your own prompts before use."
    said, objectives = found["evaluation"], found["objectives"]
    judges = [f"{k}: {_judge(card)}" for k, card in said["judges"].items()]
    controlled = {k: (v["length_controlled"] or {}).get("win_rate") for k, v in objectives.items()}
    estimates = {
        **{f"win rate, {k}": v["win_rate"] for k, v in objectives.items()},
        **{f"win rate at equal length, {k}": v for k, v in controlled.items()},
        "worst objective": found["worst_objective"]["win_rate"],
        "mean of the minimum over objectives": found["mean_of_min"],
        "KL to the base, nats a response": found["kl"]["per_response"],
        "tokens a response": found["length"],
    }
    text = (
        f"Against samples of the base on {said['prompts']} held-out prompts, {said['samples_per_prompt']} each, at most "
        f"{said['max_new_tokens']} tokens, temperature {said['temperature']:g}. Win rate: share of pairs that the judge decides "
        f"for the policy, 0.5 is no change. Judges, and their accuracy on held-out pairs: {'; '.join(judges)}."
    )
    return f"{text}\n\n{_table(estimates, 'measure')}"


def _judge(card: dict[str, Any]) -> str:
    accuracy = card.get("accuracy") or {}
    known = f"{accuracy['value']:.2f} (n = {accuracy['n']})" if "value" in accuracy else "not measured"
    name = card["path"]
    return f"{Path(name).name if Path(name).is_absolute() else name}, {known}"


def _measured(metrics: dict[str, Any]) -> str:
    """Every estimate that has an interval, and the sizes of what it was measured on."""
    table = _table({name.replace("_", " "): value for name, value in metrics.items()}, "held-out pairs")
    return table or "Nothing was measured beside the training; judge it on your own prompts before use."


def _table(estimates: dict[str, Any], of: str) -> str:
    """A row for each estimate that has an interval; empty where none has."""
    rows = [
        f"| {name} | {value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}] | {value['n']} | {value['method']} |"
        for name, value in estimates.items()
        if isinstance(value, dict) and {"value", "low", "high", "n", "method"} <= set(value)
    ]
    head = [f"| {of} | value [interval] | n | method |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows]) if rows else ""


def _limits(facts: Facts) -> str:
    common = "English preference data of the sources above; their annotators' biases are in it. Not a safety guarantee."
    if facts.kind == "policy":
        return f"{common} It was moved from its base by a learned reward, and may exploit that reward's mistakes."
    return f"{common} Rewards compare responses to one prompt; they mean little between prompts, or on other chat templates."


def _made_by(facts: Facts) -> str:
    record = facts.record
    dirty = " with uncommitted changes" if record.get("dirty") else ""
    versions = ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items() if value)
    lines = [f"- command: `{facts.command}`", f"- commit: {record.get('commit') or 'unknown'}{dirty}"]
    return "\n".join([*lines, f"- versions: {versions}", f"- seed: {record.get('seed')}"])

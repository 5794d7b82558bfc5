"""What a base model offers and needs: can policies and reward models start from it, before anything is trained.

`python utils.py model.name=...` prints the lines. They come from the model's configuration, its tokenizer and its card; weights
are opened with `--load` alone, for the comparison of `models.agreement`. Whether the machine is fit says `setup_check`.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.loading import load_pipeline
from prmd.config.policy import PolicyConfig
from prmd.config.shared import ModelConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.errors import UserError, first_line
from prmd.models.agreement import measure_agreement, rope_type, trained_length
from prmd.models.attention import attention_implementation
from prmd.models.chat_templates import (
    QUESTION,
    SYSTEM,
    check_template,
    check_trained_template,
    read_template,
    render,
    set_thinking,
    stop_token,
    thinking_switches,
)
from prmd.models.classifiers import describe_classifier
from prmd.models.loading import (
    load_base_classifier,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    load_tokenizer_from,
    model_source,
)
from prmd.models.pypi_wheel import WHEEL_MODELS
from prmd.models.sequence_models import SequenceLogps, SequenceRewards, why_not_shared
from prmd.publishing.records import base_license
from prmd.runtime import GIB, free_memory, set_seed
from prmd.setup_check import Check
from prmd.training.dry_run import PLANNED_CARD, precision_on
from prmd.training.memory import device_memory, memory_planner
from prmd.training.rehearsal import Task, meta_model

COLUMNS = 100
_NAME_COLUMNS = 20
_SHOWN_PROMPT = 200
_ANY_ROWS = 2**62
_OWN_CODE = "model.trust_remote_code"
_FOLLOW_LENGTHS = ("dynamic", "longrope")
"""Kinds of RoPE that turn positions by the longest row of a batch, where it is longer than the rows of training."""


@dataclass(frozen=True)
class _Base:
    """A base model without its weights.

    Attributes:
        settings: section `model` as it is opened here.
        source: local folder or hub id.
        config: its transformers configuration.
        longest: tokens of the longest conversation of any training.
    """

    settings: ModelConfig
    paths: ArtifactPaths
    source: str
    config: Any
    longest: int

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return self.config.get_text_config().vocab_size


def check_configured(config: Path, overrides: Sequence[str], *, load: bool = False) -> list[Check]:
    """Check the base model of a folder of configurations; arguments as for `config.loading.load_pipeline` and `check_model`."""
    found = load_pipeline(config, overrides)
    return check_model(found[RewardModelConfig], found[PolicyConfig], load=load)


def check_model(
    reward_models: RewardModelConfig, policies: PolicyConfig, *, load: bool = False
) -> list[Check]:
    """Check the base model of a configuration.

    Args:
        load: open the weights too, and compare what is computed with them here with what the model computes itself.
    """
    settings = _as_opened(reward_models.model)
    try:
        source = model_source(settings, reward_models.paths)
        config = load_model_config(settings, reward_models.paths)
    except UserError as error:
        return [_failed("own code" if _OWN_CODE in str(error) else "model", error)]
    longest = max(reward_models.training.max_length, policies.training.max_length)
    base = _Base(settings, reward_models.paths, source, config, longest)
    checks = [*_check_source(base, reward_models.model), *_check_tokenizer(base)]
    try:
        policy = meta_model(config, task="policy", dtype=torch.bfloat16, lora=None)
    except ValueError as error:
        none = f"transformers has no causal language model of the {config.model_type} family"
        return [*checks, Check("fail", "policy", f"{none} ({first_line(error)})", _OTHER_FAMILY)]
    checks += [*_check_computation(base, policy), *_check_memory(base, reward_models, policies)]
    return [*checks, *(_check_weights(base, reward_models.seed) if load else [_NOT_MEASURED])]


_OTHER_FAMILY = "choose a model of another family in model.name"
_NOT_MEASURED = Check(
    "warn",
    "agreement",
    "not measured: only the weights show that the family computes as is done here",
    "give --load, which opens the weights",
)


def report(checks: Sequence[Check]) -> list[str]:
    """The lines to print, of at most `COLUMNS` characters: status, name, what was found, and the remedy below it."""
    indent, lines = " " * (_NAME_COLUMNS + 7), []
    wrap = partial(textwrap.wrap, width=COLUMNS, break_on_hyphens=False)
    for check in checks:
        begin = f"{check.status:<5} {check.name:<{_NAME_COLUMNS}} "
        lines += wrap(check.detail, initial_indent=begin, subsequent_indent=indent)
        if check.remedy:
            lines += wrap(check.remedy, initial_indent=f"{indent}-> ", subsequent_indent=f"{indent}   ")
    return lines


def _failed(name: str, error: Exception) -> Check:
    """The check of an error, whose message ends in what to do."""
    detail, _, remedy = " ".join(str(error).split()).rpartition("; ")
    return Check("fail", name, detail or remedy, remedy if detail else "")


# ------------------------------------------------------------------ where it is, and its papers
def _as_opened(model: ModelConfig) -> ModelConfig:
    """The settings as they must be for this name: its own source, and no commit that is another model's."""
    if model.name in WHEEL_MODELS:
        return model.model_copy(update={"source": "pypi_wheel"})
    shipped = ModelConfig()
    if model.name != shipped.name and model.revision == shipped.revision:
        return model.model_copy(update={"revision": None})
    return model


def _check_source(base: _Base, given: ModelConfig) -> Iterator[Check]:
    size = f"{base.config.model_type} family, {base.rows:,} rows in its embedding"
    found, missing = f"{base.source}: {size}", []
    if not Path(base.source).is_dir():
        found = f"{base.source} of the hub, revision {base.settings.revision or 'newest'}: {size}"
        if given.revision != base.settings.revision:
            missing.append("model.revision=null, or a commit of this model: the configured one is another's")
    if given.source != base.settings.source:
        missing.append(f"model.source={base.settings.source}")
    remedy = f"for the scripts set also {' and '.join(missing)}" if missing else ""
    yield Check("warn" if missing else "ok", "model", found, remedy)
    if license := base_license(base.settings.model_dump()):
        yield Check("ok", "license", ", ".join(license))
    else:
        yield Check("warn", "license", "unknown, no model card names it", "read the model's page")


def _check_own_code(base: _Base, tokenizer: PreTrainedTokenizerBase) -> Check:
    own = [
        what
        for what, made in (("model", base.config), ("tokenizer", tokenizer))
        if type(made).__module__.startswith("transformers_modules")
    ]
    if own:
        return Check(
            "warn", "own code", f"Python code of its {' and '.join(own)} runs here", "read that code first"
        )
    return Check("ok", "own code", "none needed: transformers knows the family")


# ------------------------------------------------------------------ chat template
def _check_tokenizer(base: _Base) -> Iterator[Check]:
    settings = base.settings
    try:
        trust, revision = settings.trust_remote_code, settings.revision
        tokenizer = load_tokenizer_from(base.source, revision=revision, trust=trust, checked=False)
    except UserError as error:
        yield _failed("own code" if _OWN_CODE in str(error) else "tokenizer", error)
        return
    yield _check_own_code(base, tokenizer)
    yield from _check_template(base, tokenizer)


def _check_template(base: _Base, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    instruct = (
        "an instruction-tuned model is needed, whose tokenizer has a chat template; set model.name to one"
    )
    if not tokenizer.chat_template:
        yield Check("fail", "template", "the tokenizer has no chat template", instruct)
        return
    try:
        question = [{"role": "user", "content": QUESTION}]
        prompt = tokenizer.decode(render(tokenizer, question, add_generation_prompt=True))
    except UserError as error:
        yield _failed("template", error)
        return
    if len(prompt) > _SHOWN_PROMPT:
        prompt = f"{prompt[: _SHOWN_PROMPT // 2]} ... {prompt[-_SHOWN_PROMPT // 2 :]}"
    dated = ", its date is fixed" if "strftime_now" in read_template(tokenizer).source else ""
    yield Check("ok", "template", f"a prompt is {prompt!r}{dated}")
    ends = [_check_end_of_turn(tokenizer), _check_pad_token(base, tokenizer)]
    yield from (*ends, _check_system_role(tokenizer))
    if all(check.status == "ok" for check in ends):
        yield from _check_thinking(base, tokenizer)


def _check_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Check:
    try:
        stop = repr(tokenizer.convert_ids_to_tokens(stop_token(tokenizer)))
    except UserError as error:
        return _failed("end of turn", error)
    template = read_template(tokenizer)
    if not template.writes_stop:
        return Check(
            "ok", "end of turn", f"{stop}, which the template writes between turns; the last one gets it too"
        )
    behind = tokenizer.decode(template.closing[1:])
    return Check("ok", "end of turn", f"{stop}, then {behind!r}" if behind else stop)


def _check_pad_token(base: _Base, tokenizer: PreTrainedTokenizerBase) -> Check:
    own = tokenizer.pad_token
    try:
        check_template(tokenizer, base.source)
    except UserError as error:
        return _failed("pad token", error)
    shown = repr(tokenizer.pad_token)
    return Check("ok", "pad token", shown if own else f"it names none: {shown} is used")


def _check_system_role(tokenizer: PreTrainedTokenizerBase) -> Check:
    template = read_template(tokenizer)
    if template.takes_system:
        return Check("ok", "system role", "kept as a turn of its own")
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    try:
        tokenizer.apply_chat_template(turns, chat_template=template.source, tokenize=False)
        why = "leaves it out"
    except TemplateError:
        why = "refuses it"
    return Check("ok", "system role", f"folded into the first user turn: the template {why}")


def _check_thinking(base: _Base, tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    """The switch; then whether pad token and end of turn have rows in the embedding."""
    wanted, switches = base.settings.enable_thinking, thinking_switches(tokenizer)
    switch = f"switch {' and '.join(switches)}" if switches else "the template has no switch"
    other = _untrainable(base, tokenizer, thinking=not wanted, rows=_ANY_ROWS)
    problem = _untrainable(base, tokenizer, thinking=wanted, rows=_ANY_ROWS)  # leaves the switch as wanted
    said, opposite = (f"model.enable_thinking: {str(value).lower()}" for value in (wanted, not wanted))
    if problem is not None:
        remedy = f"set {opposite}" if other is None else ""
        failed = _failed("thinking", problem)
        yield Check("fail", "thinking", f"{switch}; {failed.detail}", remedy or failed.remedy)
        return
    if wanted and not switches:
        yield Check("warn", "thinking", f"{switch}; {said} keeps thoughts in answers", f"set {opposite}")
    else:
        possible = f"; {opposite} works too" if switches and other is None else ""
        yield Check("ok", "thinking", f"{switch}; {said}{possible}")
    problem = _untrainable(base, tokenizer, thinking=wanted, rows=base.rows)
    counted = f"{len(tokenizer):,} tokens, {base.rows:,} rows in the embedding"
    yield _failed("vocabulary", problem) if problem else Check("ok", "vocabulary", counted)


def _untrainable(
    base: _Base, tokenizer: PreTrainedTokenizerBase, *, thinking: bool, rows: int
) -> UserError | None:
    """Why no policy could be trained with this switch and so many rows in the embedding; the tokenizer keeps the switch."""
    set_thinking(tokenizer, thinking)
    try:
        check_trained_template(tokenizer, base.source, rows=rows)
    except UserError as error:
        return error
    return None


# ------------------------------------------------------------------ what is computed with it
def _check_computation(base: _Base, policy: nn.Module) -> Iterator[Check]:
    """Its classes, attention, and lengths.

    Args:
        policy: the causal model without storage.
    """
    millions = sum(p.numel() for p in policy.parameters()) / 1e6
    yield Check("ok", "policy", f"{type(policy).__name__}, {millions:,.1f} million parameters")
    yield _check_classifier(base)
    attention = policy.config._attn_implementation
    try:
        if attention != "eager":
            attention = attention_implementation(base.settings.attention, base.config)
    except UserError as error:
        yield _failed("attention", error)
        return
    if attention == "eager":
        slow = "nothing is wrong, but it is slow and holds all scores: keep training.max_length small"
        yield Check("warn", "attention", "eager, the family has no exact sdpa", slow)
    else:
        yield Check("ok", "attention", attention.replace("_or_", " or "))
    yield _check_sharing(base, attention)
    yield _check_length(base)


def _check_classifier(base: _Base) -> Check:
    try:
        found = describe_classifier(base.config)
        model = meta_model(base.config, task="reward_model", dtype=torch.bfloat16, lora=None)
    except UserError as error:
        return _failed("reward model", error)
    except ValueError as error:
        return Check("fail", "reward model", f"{found}: {first_line(error)}", _OTHER_FAMILY)
    if not hasattr(model, "score"):
        return Check(
            "fail",
            "reward model",
            f"{type(model).__name__} has no head named score, as decoders have",
            _OTHER_FAMILY,
        )
    return Check("ok", "reward model", found)


def _check_sharing(base: _Base, attention: str) -> Check:
    base.config._attn_implementation = attention
    if why := why_not_shared(base.config, base.longest):
        remedy = "nothing is wrong: each response gets its own row, and the prompt is computed once for each"
        return Check("warn", "shared prompts", f"no: {why}", remedy)
    return Check("ok", "shared prompts", "yes: a prompt is computed once for all of its responses")


def _check_length(base: _Base) -> Check:
    trained, kind = trained_length(base.config), rope_type(base.config)
    if not isinstance(trained, int):
        return Check("ok", "length", f"training.max_length {base.longest:,}, the model names none of its own")
    detail = f"training.max_length {base.longest:,}, the model's own {trained:,}"
    if base.longest <= trained:
        return Check("ok", "length", detail)
    remedy = f"set training.max_length to at most {trained}"
    if kind in _FOLLOW_LENGTHS:
        detail = f"{detail}, and beyond it rows of a batch change each other (RoPE {kind})"
        return Check("fail", "length", detail, f"{remedy}, or another rope_type in its config.json")
    return Check("warn", "length", detail, remedy)


# ------------------------------------------------------------------ memory
def _check_memory(base: _Base, reward_models: RewardModelConfig, policies: PolicyConfig) -> Iterator[Check]:
    """The plan of the dry runs for a reward model, and for a policy with adapters and with all weights."""
    if base.config.get_text_config() is not base.config:
        yield Check(
            "warn", "memory", "not planned: the model reads more than text", "choose a model of text alone"
        )
        return
    method = reward_models.tuning.method
    name = "reward model, LoRA" if method == "lora" else "reward model, full"
    if _check_classifier(base).status == "ok":
        yield _plan(base, name, "reward_model", reward_models.tuning, reward_models.training)
    for method, name in (("lora", "policy, LoRA"), ("full", "policy, full")):
        tuning = policies.tuning.model_copy(update={"method": method, "optimizer": "auto"})
        yield _plan(base, name, "policy", tuning, policies.training)


def _plan(base: _Base, name: str, task: Task, tuning: TuningConfig, training: TrainingConfig) -> Check:
    """Against the card of this machine, or one of 32 GiB; of pairs at their longest."""
    card = device_memory() or PLANNED_CARD
    plan = memory_planner(base.config, tuning, training, task)
    try:
        precision, lacking = precision_on(plan, base.settings, tuning, training, card)
        found = plan(precision=precision, device_bytes=card)
    except UserError as error:
        return replace(_failed(name, error), status="warn")
    how = precision.describe().partition(" at ")[0]
    detail = (
        f"{found.total / GIB:.1f} of {card / GIB:.0f} GiB: {how}, {training.pairs_per_device} pairs at once"
    )
    remedy = found.first_change or lacking
    return Check("warn" if remedy else "ok", name, detail, remedy)


# ------------------------------------------------------------------ with its weights
def _check_weights(base: _Base, seed: int) -> Iterator[Check]:
    """Whether log-probabilities and rewards are computed here as by the model itself (`models.agreement`)."""

    def classifier() -> nn.Module:
        pad = load_tokenizer(base.settings, base.paths).pad_token_id
        set_seed(seed)  # of the new head
        return load_base_classifier(base.settings, base.paths, pad_token_id=pad)

    yield _measured("log-probabilities", lambda: load_causal_lm(base.settings, base.paths), base.longest)
    free_memory()
    yield _measured("rewards", classifier, base.longest)


def _measured(what: str, load: Callable[[], nn.Module], longest: int) -> Check:
    try:
        model = load()
        scorer = SequenceRewards(model) if what == "rewards" else SequenceLogps(model)
        found = measure_agreement(model, scorer, longest=longest)
    except UserError as error:
        return _failed(what, error)
    unit = "" if what == "rewards" else " nats a token"
    size = f"{found.apart:.2g}{unit} from the model's own, where {found.allowed:.1g} may be rounding"
    return Check("ok", what, f"{size} ({str(model.dtype).removeprefix('torch.')}, {model.device.type})")

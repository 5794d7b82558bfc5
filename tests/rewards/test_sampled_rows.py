"""Samples with control tokens in them: reward model and judge read one text, the policy is measured on what it sampled."""

from pathlib import Path

import pytest
import torch
from tiny_models import plain_logp, tiny_causal_lm, tiny_classifier
from tiny_pipeline import no_model_loads
from tiny_workspace import reward_model_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prmd.config.shared import CalibrationConfig, RewardModelConfig
from prmd.inference.generation import GeneratedResponse, sample_rows
from prmd.inference.reference import reference_logps, reference_samples
from prmd.judges.reward_model import Conversation, given_judge
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import Tokens, tokenize_prompt
from prmd.rewards.reward_model import RewardModel, load_reward_model, rows_of_samples

PROMPTS = [({"role": "user", "content": text},) for text in ("why is the sky blue?", "what is it?")]
PAD, START, END = 0, 1, 2
Samples = list[list[GeneratedResponse]]


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    """A base model that likes to sample pad tokens and beginnings of turns."""
    base = tiny_causal_lm(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    logits = model.get_output_embeddings()
    logits.weight = torch.nn.Parameter(logits.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        logits.weight[[PAD, START]] *= 8
    model.save_pretrained(base)
    calibration = CalibrationConfig(samples_per_prompt=6, max_new_tokens=12)
    return reward_model_config(tmp_path / "root", base, calibration=calibration)


@pytest.fixture
def model(tmp_path: Path, config: RewardModelConfig) -> RewardModel:
    return load_reward_model(tiny_classifier(tmp_path / "rm", seed=3), shared=config)


@pytest.fixture
def sampled(config: RewardModelConfig) -> tuple[list[Tokens], Samples]:
    tokenizer = load_tokenizer(config.model, config.paths)
    prompts = [tokenize_prompt(tokenizer, messages, max_length=100) for messages in PROMPTS]
    samples = reference_samples(config, tokenizer, prompts)
    inside = [token for group in samples for s in group for token in s.token_ids[:-1]]
    assert inside.count(PAD) > 3 and inside.count(START) > 3
    return prompts, samples


def test_reward_model_judge_and_a_plain_user_read_the_same_text(
    config: RewardModelConfig,
    model: RewardModel,
    sampled: tuple[list[Tokens], Samples],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_of_samples(model, *sampled)
    rewards = model.rewards(rows, description="samples")
    monkeypatch.setattr("prmd.judges.reward_model.judge_accuracy", lambda judge, pairs: {})
    monkeypatch.setattr("prmd.judges.reward_model.read_pairs", lambda *arguments: [])
    judge = given_judge(
        "helpful", str(model.directory), lambda folder: load_reward_model(folder, shared=config)
    )
    texts = [tuple(s.text for s in group) for group in sampled[1]]
    judged = judge.scores([Conversation(m, t) for m, t in zip(PROMPTS, texts, strict=True)])
    plain = AutoModelForSequenceClassification.from_pretrained(model.directory).eval()
    for messages, said, ours, theirs, row in zip(PROMPTS, texts, rewards, judged, rows, strict=True):
        assert ours[:, 0].numpy() == pytest.approx(theirs)
        assert not {PAD, START} & {token for response in row.responses for token in response}
        assert all(response.count(END) == 1 for response in row.responses)
        for text, reward in zip(said, ours[:, 0], strict=True):
            chat = [*messages, {"role": "assistant", "content": text}]
            ids = model.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
            with torch.no_grad():
                assert float(plain(torch.tensor([ids])).logits[0, 0]) == pytest.approx(
                    float(reward), abs=1e-4
                )


def test_log_probabilities_are_of_the_sampled_tokens(
    config: RewardModelConfig, sampled: tuple[list[Tokens], Samples]
) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)
    rows = sample_rows(*sampled, tokenizer, keep_suffix=False)
    base = AutoModelForCausalLM.from_pretrained(config.model.name).eval()
    found = reference_logps(config, tokenizer, rows)
    for prompt, group, values in zip(*sampled, found, strict=True):
        wanted = [plain_logp(base, list(prompt), list(s.token_ids)) for s in group]
        assert values.tolist() == pytest.approx(wanted, abs=1e-3)


def test_rewards_that_an_earlier_version_kept_are_finished(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="prmd")
    first, second = (tokenize_prompt(model.tokenizer, messages, max_length=100) for messages in PROMPTS)
    letters = tuple(model.tokenizer.convert_tokens_to_ids(list("sky")))  # one token in the text as a message
    assert model.tokenizer.encode("sky") != list(letters)
    samples = [
        GeneratedResponse("sky", (*letters, END), True),
        GeneratedResponse("sky", (START, *letters), False),
    ]
    prompts, groups = [first, second], [samples] * 2
    read = rows_of_samples(model, prompts, groups)
    assert read[0].responses[0] == read[0].responses[1] == read[1].responses[0]  # one text, one row
    earlier = sample_rows(prompts, groups, model.tokenizer, keep_suffix=True)
    assert read[0] != earlier[0]
    model.rewards(earlier[:1], description="as an earlier version read them")
    assert not caplog.records
    assert rows_of_samples(model, prompts, groups) == [earlier[0], read[1]]
    assert "control tokens within them, of 1 prompts" in caplog.text
    no_model_loads(monkeypatch)
    model.rewards(rows_of_samples(model, [first], [samples]), description="from the cache")

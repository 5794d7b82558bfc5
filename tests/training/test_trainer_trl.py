"""Our DPO against TRL's own trainer, built by its public constructor: tokens, loss and gradient of one batch."""

import math

import pytest
import torch
from datasets import Dataset
from model_families import assert_same_gradients, gradients
from tiny_models import tiny_causal_lm, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from prmd.models.loading import load_tokenizer_from
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import tokenize_row
from prmd.pessimism.losses import dpo_loss, implicit_margins

BETA = 0.1
CONVERSATIONS = [
    ([("user", "why is the sky blue?")], "I do not know", "the quick brown fox jumps"),
    ([("user", "what is it?"), ("assistant", "no"), ("user", "yes?")], "It is a small test", "no"),
    ([("system", "be brief"), ("user", "Q")], "A", "the lazy dog asks why"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer_from(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def causal(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config())


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    folder = tiny_causal_lm(tmp_path_factory.mktemp("trl"))
    rows = [
        {
            "prompt": messages_of(turns),
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for turns, chosen, rejected in CONVERSATIONS
    ]
    arguments = DPOConfig(
        output_dir=str(folder / "out"),
        beta=BETA,
        max_length=None,
        per_device_train_batch_size=len(rows),
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        ref_model=causal(seed=11),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer_from(folder),
    )


def trl_tokens(batch):
    """(prompt, response) ids of every sequence of TRL's batch: the chosen ones, then the rejected ones."""
    found = []
    for ids, mask, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        real = mask.bool()
        found.append((tuple(ids[real & ~completion.bool()].tolist()), tuple(ids[completion.bool()].tolist())))
    return found


def test_trl_tokenises_alike_but_for_what_follows_the_end_of_turn(trl_trainer, tokenizer):
    theirs = trl_tokens(next(iter(trl_trainer.get_train_dataloader())))
    newline = tuple(tokenizer.encode("\n", add_special_tokens=False))
    for i, (turns, chosen, rejected) in enumerate(CONVERSATIONS):
        policy = tokenize_row(tokenizer, messages_of(turns), (chosen, rejected), keep_suffix=False)
        for side, response in enumerate(policy.responses):
            assert theirs[i + side * len(CONVERSATIONS)] == (policy.prompt_ids, response + newline)


def test_dpo_loss_and_gradient_equal_trls(trl_trainer, tokenizer):
    batch = next(iter(trl_trainer.get_train_dataloader()))
    model = trl_trainer.model.train()
    theirs = trl_trainer.compute_loss(model, dict(batch))
    expected = gradients(model, theirs)
    rows = [
        tokenize_row(tokenizer, messages_of(turns), (chosen, rejected), keep_suffix=True)
        for turns, chosen, rejected in CONVERSATIONS
    ]
    tensors = collate_rows(rows, pad_id=0)
    with torch.no_grad():
        ref = SequenceLogps(causal(seed=11))(**tensors).view(-1, 2)
    logps = SequenceLogps(model)(**tensors).view(-1, 2)
    implicit = implicit_margins(
        policy_chosen_logps=logps[:, 0],
        policy_rejected_logps=logps[:, 1],
        ref_chosen_logps=ref[:, 0],
        ref_rejected_logps=ref[:, 1],
        beta=BETA,
    )
    ours = dpo_loss(implicit_margins=implicit).mean()
    assert float(theirs.detach()) == pytest.approx(float(ours.detach()), abs=1e-5)
    assert abs(float(theirs.detach()) - math.log(2)) > 0.05  # policy and reference do differ
    assert_same_gradients(gradients(model, ours), expected)

"""Tiny random models in Hugging Face's own format, made in a second: a tokenizer with a chat template, a causal model, a
one-logit classifier. Nothing is fetched; the tokenizer is learnt from a few lines below.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "the quick brown fox jumps over the lazy dog and asks why the sky is blue",
    "user assistant system question answer yes no I do not know",
    "Q: What is it?\nA: It is a small test of the tokenizer.",
)
VOCABULARY = 300
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
}
"""Two layers of 32 dimensions in any family of decoders, initialised widely enough that outputs differ visibly."""
SMALL_MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}
"""What a family with state spaces is given besides."""
QUESTIONS = ["why is the sky blue?", "I", "the quick brown fox jumps over the lazy dog", "Q: is it?", "no no"]


def tiny_tokenizer(path: Path, *, pad: str = "<|pad|>", template: str | None = TEMPLATE) -> Path:
    """Save a byte-level BPE tokenizer of 300 tokens with a ChatML template that ends a turn in `<|im_end|>` and a newline."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token=pad,
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


def tiny_config(**changes: object) -> LlamaConfig:
    """A Llama of `SMALL` size."""
    sizes = {"vocab_size": VOCABULARY, "intermediate_size": 64, "max_position_embeddings": 2048}
    return LlamaConfig(**(SMALL | sizes | {"eos_token_id": 2} | changes))


def tiny_causal_lm(path: Path, *, seed: int = 0) -> Path:
    """Save a random causal model with the tokenizer."""
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config()).save_pretrained(path)
    return tiny_tokenizer(path)


def tiny_classifier(path: Path, *, seed: int = 0) -> Path:
    """Save a random one-logit classifier with the tokenizer."""
    torch.manual_seed(seed)
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(path)
    return tiny_tokenizer(path)


def direct_kl(
    policy: torch.nn.Module, reference: torch.nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]
) -> tuple[float, float, float]:
    """Exact summed KL, log-ratio and summed k3 of one response, by plain forward passes over the whole conversation."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        ours, theirs = (
            m(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1) for m in (policy, reference)
        )
    chosen = torch.tensor(response)[:, None]
    ratios = ours.gather(1, chosen) - theirs.gather(1, chosen)
    k3 = (-ratios).exp() - 1 + ratios
    return float((ours.exp() * (ours - theirs)).sum()), float(ratios.sum()), float(k3.sum())


def plain_logp(model: torch.nn.Module, prompt: list[int], response: list[int]) -> float:
    """Summed log-probability of a response by a plain forward pass."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logps = model(ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logps.gather(1, torch.tensor(response)[:, None]).sum())


def labelled(path: Path, labels: dict[int, str], **changes: object) -> Path:
    """Save a tiny classifier with these labels and its tokenizer."""
    torch.manual_seed(3)
    config = tiny_config(num_labels=len(labels), id2label=labels, label2id={v: k for k, v in labels.items()})
    for key, value in changes.items():
        setattr(config, key, value)
    LlamaForSequenceClassification(config).save_pretrained(path)
    return tiny_tokenizer(path)


def direct_logits(folder: Path, *texts: str) -> torch.Tensor:
    """Logits of one input, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]

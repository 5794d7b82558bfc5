"""The trainer against gradient steps taken by hand, and what it logs, refuses and saves."""

import math

import pytest
import torch
from model_families import gradients, separate_logps, separate_rewards
from tiny_models import VOCABULARY, tiny_config, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from prmd.config.shared import LoraConfig, TrainingConfig
from prmd.errors import NotFiniteError
from prmd.models.loading import add_lora, load_tokenizer_from
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.pairs import PreferencePair
from prmd.pessimism.losses import bradley_terry_loss, distillation_loss, dpo_loss, implicit_margins
from prmd.training.arguments import on_one_gpu, training_arguments
from prmd.training.batches import plan_training
from prmd.training.trainer import PAIR_WEIGHT, PairData, PairLoss, PairTrainer, weight_column

BETA = 0.1
LEARNING_RATE = 0.05


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer_from(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def causal(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config())


def random_data(n, seed=0, **columns):
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest):
        length = int(torch.randint(1, longest, (), generator=generator))
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    rows = [PrefixRow(tokens(12), (tokens(9), tokens(9))) for _ in range(n)]
    ref = torch.randn(n, 2, generator=generator) * 3 - 30
    return PairData(rows, {"ref_logps": ref, **columns})


def margins_of(logps, ref):
    return implicit_margins(
        policy_chosen_logps=logps[:, 0],
        policy_rejected_logps=logps[:, 1],
        ref_chosen_logps=ref[:, 0],
        ref_rejected_logps=ref[:, 1],
        beta=BETA,
    )


def dpo(logps, columns):
    implicit = margins_of(logps, columns["ref_logps"])
    return PairLoss(dpo_loss(implicit_margins=implicit), {"rewards/margins": implicit.detach()})


def squared(logps, columns):
    implicit = margins_of(logps, columns["ref_logps"])
    loss = distillation_loss(
        implicit_margins=implicit, target_margins=columns["target_margins"], kind="squared"
    )
    return PairLoss(loss, {"margins/target": columns["target_margins"]})


def bradley_terry(rewards, columns):
    loss = bradley_terry_loss(chosen_rewards=rewards[:, 0], rejected_rewards=rewards[:, 1])
    return PairLoss(loss, {"rewards/chosen": rewards[:, 0].detach()})


def trainer_of(model, data, tokenizer, directory, **changes):
    """A trainer that takes plain gradient steps at a constant rate, so that steps show gradients."""
    options = {
        "rows_per_batch": 2,
        "accumulation": 2,
        "loss": dpo,
        "eval_data": None,
        "logging_steps": 1,
        "optimizer": OptimizerNames.SGD,
        "eval_tokens": 8192,
        "before_step": None,
    } | changes
    training = TrainingConfig(
        learning_rate=LEARNING_RATE,
        pairs_per_device=options["rows_per_batch"],
        gradient_accumulation_steps=options["accumulation"],
        lr_scheduler="constant_with_warmup",
        warmup_ratio=0.0,
        max_grad_norm=1e9,
        logging_steps=options["logging_steps"],
    )
    lengths = [row.shared_length for row in data.rows]
    plan = plan_training(lengths, list(range(len(data.rows))), training, seed=1, processes=1)
    arguments = training_arguments(
        training,
        directory=directory,
        learning_rate=LEARNING_RATE,
        optimizer="adamw_float32",
        bf16=False,
        seed=0,
        steps=plan.steps,
        accumulation=plan.size.accumulation,
    )
    arguments.optim = options["optimizer"]
    trainer = PairTrainer(
        model,
        arguments,
        data=data,
        plan=plan.batches,
        eval_data=options["eval_data"],
        loss_function=options["loss"],
        before_step=options["before_step"],
        tokenizer=tokenizer,
        eval_tokens=options["eval_tokens"],
    )
    trainer.step_pairs = plan.pairs
    return trainer


def step_by_hand(model, rows, loss_of):
    """One plain gradient step on the mean loss over `rows`, by separate forward passes; the loss and gradient norm."""
    loss = loss_of(model, rows)
    found = gradients(model, loss)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= LEARNING_RATE * found[name]
    return float(loss.detach()), math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))


def dpo_by_hand(data):
    where = {row: i for i, row in enumerate(data.rows)}

    def loss_of(model, rows):
        logps = separate_logps(model, rows).view(-1, 2)
        ref = torch.stack([data.columns["ref_logps"][where[row]] for row in rows])
        difference = (logps[:, 0] - ref[:, 0]) - (logps[:, 1] - ref[:, 1])
        return torch.log1p(torch.exp(-BETA * difference)).mean()

    return loss_of


def assert_same_parameters(ours, expected, start):
    """Equal displacements from `start` to 1e-4 of the largest one."""
    for name, parameter in expected.named_parameters():
        before = dict(start.named_parameters())[name]
        wanted, found = parameter - before, dict(ours.named_parameters())[name] - before
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 2e-7, name


# ------------------------------------------------------------------ accumulation
@pytest.mark.parametrize(("rows_per_batch", "accumulation"), [(4, 1), (1, 4), (2, 2)])
def test_a_step_is_the_gradient_of_the_mean_however_it_is_accumulated(
    tokenizer, tmp_path, rows_per_batch, accumulation
):
    data, ours, by_hand = random_data(4), causal(), causal()
    trainer = trainer_of(
        SequenceLogps(ours),
        data,
        tokenizer,
        tmp_path,
        rows_per_batch=rows_per_batch,
        accumulation=accumulation,
    )
    trainer.train()
    loss, norm = step_by_hand(by_hand, data.rows, dpo_by_hand(data))
    assert_same_parameters(ours, by_hand, causal())
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss, abs=1e-5)
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("n", [5, 6, 7])
def test_a_last_step_of_fewer_pairs_is_their_mean_too(tokenizer, tmp_path, n):
    data, ours, by_hand = random_data(n), causal(), causal()
    trainer = trainer_of(SequenceLogps(ours), data, tokenizer, tmp_path)
    trainer.train()
    expected = [
        step_by_hand(
            by_hand,
            [data.rows[i] for i in step],
            dpo_by_hand(data),
        )
        for step in trainer.step_pairs
    ]
    assert_same_parameters(ours, by_hand, causal())
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [log["loss"] for log in logs] == pytest.approx([loss for loss, _ in expected], abs=1e-5)
    assert [log["grad_norm"] for log in logs] == pytest.approx([norm for _, norm in expected], rel=1e-4)


def test_reward_models_are_trained_by_the_same_steps(tokenizer, tmp_path):
    def made():
        torch.manual_seed(4)
        return LlamaForSequenceClassification(tiny_config(num_labels=1))

    def loss_of(model, rows):
        rewards = separate_rewards(model, rows).view(-1, 2)
        likelihood = torch.log1p(torch.exp(rewards[:, 1] - rewards[:, 0]))
        return (likelihood + 0.01 * (rewards[:, 0] + rewards[:, 1]) ** 2).mean()

    data, ours, by_hand = random_data(4), made(), made()
    trainer = trainer_of(SequenceRewards(ours), data, tokenizer, tmp_path, loss=bradley_terry)
    trainer.train()
    loss, _ = step_by_hand(by_hand, data.rows, loss_of)
    assert_same_parameters(ours, by_hand, made())
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)


def test_adapters_alone_move(tokenizer, tmp_path):
    model = add_lora(causal(), LoraConfig(r=2, alpha=4), task="CAUSAL_LM")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(SequenceLogps(model), random_data(8), tokenizer, tmp_path).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


def test_before_a_step_all_its_pairs_are_seen_once_and_what_is_found_reaches_each_of_its_losses(
    tokenizer, tmp_path
):
    asked, read = [], []
    data = random_data(7, own=torch.arange(7.0))

    def sums(model, batches):
        assert model is trainer.model and trainer.state.global_step == len(asked)
        asked.append([row for rows in batches for row in rows])
        return {"sum": torch.tensor(float(sum(asked[-1])))}

    def loss(logps, columns):
        found = columns.get("sum")
        read.append((columns["own"].tolist(), None if found is None else float(found)))
        return dpo(logps, columns)

    model = SequenceLogps(causal())
    how = {"loss": loss, "before_step": sums, "eval_data": data}
    trainer = trainer_of(model, data, tokenizer, tmp_path, **how)
    trainer.train()
    assert [sorted(rows) for rows in asked] == [sorted(rows) for rows in trainer.step_pairs]
    assert [len(rows) for rows in asked] == [4, 3]
    for rows, found in read:
        assert [found] == [sum(step) for step in asked if set(rows) <= set(step)]
    assert len(read) == 4
    trainer.evaluate()
    assert len(read) > 4 and all(found is None for _, found in read[4:])


# ------------------------------------------------------------------ weights of pairs
def reward_model():
    torch.manual_seed(4)
    return LlamaForSequenceClassification(tiny_config(num_labels=1))


WEIGHTED = {"bradley_terry": bradley_terry, "dpo": dpo, "squared": squared}


def gradient_of(trainer, rows, weight=1.0):
    """Gradient of the loss of one micro-batch, flat."""
    batch = trainer.train_dataset.data.batch(rows, pad_id=0, share_prompt=False)
    batch |= {"weight": weight, "pair_index": rows, "padding": 0}
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    found = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    return torch.cat([grad.flatten() for grad in found]).double()


@pytest.mark.parametrize("name", WEIGHTED)
def test_weight_2_is_the_pair_twice(tokenizer, tmp_path, name):
    data = random_data(3, target_margins=torch.tensor([0.4, -1.5, 3.0]))
    weights = torch.tensor([2.0, 1.0, 1.0])
    weighted = PairData(data.rows, {**data.columns, PAIR_WEIGHT: weights / weights.mean()})
    model = SequenceRewards(reward_model()) if name == "bradley_terry" else SequenceLogps(causal())
    model.double()
    twice, once = (trainer_of(model, d, tokenizer, tmp_path, loss=WEIGHTED[name]) for d in (data, weighted))
    expected = gradient_of(twice, [0, 0, 1, 2])
    found = gradient_of(once, [0, 1, 2])
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (gradient_of(twice, [0, 1, 2]) - expected).abs().max() > 1e-2 * expected.abs().max()
    # cut into micro-batches of two pairs and one: weights (2/3, 1/3) x 2 make their mean that of the step
    parts = gradient_of(once, [0, 1], 4 / 3) + gradient_of(once, [2], 2 / 3)
    assert (parts / 2 - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_weights_are_part_of_every_step_however_it_is_accumulated(tokenizer, tmp_path):
    data, weights = random_data(6), torch.tensor([0.2, 3.0, 0.5, 1.3, 0.6, 0.4])
    where = {row: i for i, row in enumerate(data.rows)}

    def loss_of(model, rows):
        each = [weights[where[row]] * dpo_by_hand(data)(model, [row]) for row in rows]
        return torch.stack(each).mean()

    weighted = PairData(data.rows, {**data.columns, PAIR_WEIGHT: weights})
    for rows_per_batch, accumulation in ((4, 1), (2, 2)):
        ours, by_hand = causal(), causal()
        trainer = trainer_of(
            SequenceLogps(ours),
            weighted,
            tokenizer,
            tmp_path / str(rows_per_batch),
            rows_per_batch=rows_per_batch,
            accumulation=accumulation,
        )
        trainer.train()
        losses = [
            step_by_hand(by_hand, [data.rows[i] for i in step], loss_of)[0] for step in trainer.step_pairs
        ]
        assert_same_parameters(ours, by_hand, causal())
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert logged == pytest.approx(losses, abs=1e-5)


def test_weights_of_one_train_as_none_to_the_last_digit_and_no_held_out_mean_is_weighted(tokenizer, tmp_path):
    data, trained, logs = random_data(6), [], []
    for i, weights in enumerate((None, torch.ones(6))):
        model, columns = causal(), {} if weights is None else {PAIR_WEIGHT: weights}
        weighted = PairData(data.rows, {**data.columns, **columns})
        held = PairData(data.rows, {**data.columns, **{k: torch.arange(6.0) for k in columns}})
        trainer = trainer_of(SequenceLogps(model), weighted, tokenizer, tmp_path / str(i), eval_data=held)
        trainer.train()
        trained.append(model)
        logs.append((trainer.evaluate(), [row.get("loss") for row in trainer.state.log_history]))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in trained), strict=True))
    assert logs[0] == logs[1]


def test_a_column_of_weights_is_of_pairs_that_have_some():
    def pair(weight):
        return PreferencePair("a", ({"role": "user", "content": "q"},), "c", "r", "s", "helpful", weight)

    assert weight_column([pair(None), pair(None)], added=3) == {}
    mixed = weight_column([pair(None), pair(0.25), pair(1.75)], added=2)[PAIR_WEIGHT]
    assert mixed.tolist() == [1.0, 0.25, 1.75, 1.0, 1.0] and mixed.dtype == torch.float32


# ------------------------------------------------------------------ before the first step
def test_losses_at_initialisation(tokenizer, tmp_path):
    model = causal()
    targets = torch.tensor([0.4, -1.5, 3.0, 0.0, 2.2])
    rows = random_data(5).rows
    with torch.no_grad():
        ref = SequenceLogps(model)(**collate_rows(rows, pad_id=0)).view(-1, 2)
    data = PairData(rows, {"ref_logps": ref, "target_margins": targets})
    for loss, expected in ((dpo, math.log(2)), (squared, float(targets.square().mean()))):
        trainer = trainer_of(
            SequenceLogps(model), data, tokenizer, tmp_path, loss=loss, eval_data=data, eval_tokens=40
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------ logs
def test_logged_metrics_are_means_over_pairs_and_not_over_batches(tokenizer, tmp_path):
    n = 11
    values = torch.arange(n).float() ** 2

    def loss(logps, columns):
        return PairLoss(logps.sum(dim=1) * 1e-3, {"value": columns["value"]})

    data = random_data(n, value=values)
    trainer = trainer_of(SequenceLogps(causal()), data, tokenizer, tmp_path, loss=loss, logging_steps=2)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "value" in row]
    assert [row["step"] for row in logs] == [
        1,
        2,
    ]  # the third step is not logged: 11 pairs, 4 a step, every second
    for row, indices in zip(logs, trainer.step_pairs, strict=False):
        assert row["value"] == pytest.approx(float(values[indices].mean()), rel=1e-6)
        assert 0 <= row["padding_share"] < 1
        assert row["tokens_per_second"] > 0


def test_held_out_metrics_are_means_over_pairs(tokenizer, tmp_path):
    values = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0, 5.0])

    def loss(logps, columns):
        return PairLoss(columns["value"] + 0 * logps[:, 0], {"twice": 2 * columns["value"]})

    held_out = random_data(7, seed=3, value=values)
    model = SequenceLogps(causal())
    for tokens in (20, 60, 10_000):
        trainer = trainer_of(
            model, random_data(4), tokenizer, tmp_path, loss=loss, eval_data=held_out, eval_tokens=tokens
        )
        found = trainer.evaluate()
        assert found == pytest.approx(
            {"eval_loss": float(values.mean()), "eval_twice": 2 * float(values.mean())}, rel=1e-6
        )
        assert trainer.state.log_history[-1].items() >= found.items()
    assert trainer_of(model, random_data(4), tokenizer, tmp_path).evaluate() == {}


# ------------------------------------------------------------------ refusals and saving
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_pairs(tokenizer, tmp_path):
    text = tokenizer.encode("the lazy dog asks why", add_special_tokens=False)
    data = random_data(8, bad=torch.tensor([0.0] * 5 + [float("nan")] + [0.0] * 2))
    rows = list(data.rows)
    rows[5] = PrefixRow(tuple(text), rows[5].responses)

    def loss(logps, columns):
        return PairLoss(logps.sum(dim=1) + columns["bad"], {"x": logps[:, 0].detach()})

    model = SequenceLogps(causal())
    trainer = trainer_of(model, PairData(rows, data.columns), tokenizer, tmp_path, loss=loss)
    with pytest.raises(NotFiniteError, match=r"not finite at step \d for training pairs \[5\]") as error:
        trainer.train()
    assert "the lazy dog asks why" in str(error.value)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_saved_model_is_a_plain_folder_without_pickles(tokenizer, tmp_path):
    model = causal()
    trainer = trainer_of(SequenceLogps(model), random_data(4), tokenizer, tmp_path / "work")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load_tokenizer_from(tmp_path / "saved").chat_template == tokenizer.chat_template
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors", ".jinja"}


def test_a_process_that_sees_two_gpus_trains_on_one(tmp_path, caplog):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert on_one_gpu(arguments).n_gpu == arguments.n_gpu <= 1 and not caplog.records
    arguments._n_gpu = 2  # what transformers notes of a process without a launcher, and wraps the model by
    with caplog.at_level("INFO"):
        assert on_one_gpu(arguments).n_gpu == 1
    assert "2 GPUs are visible and one is used; for all: accelerate launch" in caplog.text

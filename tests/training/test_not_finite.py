"""A training whose loss or gradient is not finite stops at that step and names its pairs, ours and TRL's alike."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_causal_lm
from tiny_policies import trained_on
from tiny_training import ROWS, TRAINING, a_run, loss_of, train
from tiny_workspace import reward_model_config, write_prepared
from torch import Tensor

from prmd.config.policy import PolicyConfig
from prmd.config.shared import LoraConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.errors import NotFiniteError
from prmd.models.loading import load_tokenizer
from prmd.policies.trl_baseline import train_trl_dpo
from prmd.training.batches import plan_training
from prmd.training.stopping import RefuseNotFinite, named_rows
from prmd.training.trainer import Columns, PairData, PairLoss

IDS = [f"honest-{i}" for i in range(len(ROWS))]
MARK = torch.zeros(len(ROWS))


@pytest.fixture
def shared(tmp_path: Path) -> RewardModelConfig:
    return reward_model_config(tmp_path / "root", tiny_causal_lm(tmp_path / "base"))


def marked(*rows: int) -> PairData:
    return PairData(ROWS, {"mark": MARK.index_fill(0, torch.tensor(rows, dtype=torch.long), 1.0)}, IDS)


def step_of(row: int, shared: RewardModelConfig) -> tuple[int, set[str]]:
    """The step that trains on a row, from one, and the names of its pairs."""
    plan = plan_training(
        [r.shared_length for r in ROWS], list(range(12)), TRAINING, seed=shared.seed, processes=1
    )
    step = next(i for i, rows in enumerate(plan.pairs) if row in rows)
    return step + 1, {IDS[i] for i in plan.pairs[step]}


@pytest.mark.parametrize("row", [0, 7, 11])
def test_a_finite_loss_with_a_gradient_that_is_not_stops_before_the_step(
    shared: RewardModelConfig, tmp_path: Path, row: int
) -> None:
    models = []

    def steep(logps: Tensor, columns: Columns) -> PairLoss:
        result = loss_of(logps, columns)
        nothing = (logps[:, 0] - logps[:, 0].detach()).abs()
        flat = torch.where(columns["mark"] > 0, nothing, torch.ones(1)).sqrt()  # of infinite slope at 0
        return replace(result, loss=result.loss + flat)

    def load(master_weights: bool) -> torch.nn.Module:
        models.append(run.load_model(master_weights))
        return models[-1]

    run = a_run(shared, tmp_path / "run", data=marked(row), eval_data=None, loss_function=steep)
    training = TRAINING.model_copy(update={"checkpoints": (1.0,)})
    with pytest.raises(NotFiniteError) as stop:
        train(replace(run, training=training, load_model=load))
    step, pairs = step_of(row, shared)
    said = str(stop.value)
    assert f"test: the gradient is not finite at step {step}, of the pairs [" in said and "\n" not in said
    assert set(said.partition("[")[2].partition("]")[0].split(", ")) == pairs and IDS[row] in pairs
    assert all(bool(torch.isfinite(p).all()) for p in models[0].parameters())


def test_a_loss_that_is_not_finite_names_the_pair(shared: RewardModelConfig, tmp_path: Path) -> None:
    def bad(logps: Tensor, columns: Columns) -> PairLoss:
        result = loss_of(logps, columns)
        return replace(result, loss=result.loss / (1 - columns["mark"]))

    run = a_run(shared, tmp_path / "run", data=marked(7), eval_data=None, loss_function=bad)
    training = TRAINING.model_copy(update={"checkpoints": (1.0,)})
    wanted = (
        rf"not finite at step {step_of(7, shared)[0]} for training pairs \[honest-7\] \(batch of pairs \["
    )
    with pytest.raises(NotFiniteError, match=wanted):
        train(replace(run, training=training))


def test_held_out_pairs_are_named_too(shared: RewardModelConfig, tmp_path: Path) -> None:
    def bad(logps: Tensor, columns: Columns) -> PairLoss:
        result = loss_of(logps, columns)
        return replace(result, loss=result.loss / (1 - columns["mark"]))

    run = a_run(shared, tmp_path / "run", data=marked(), eval_data=marked(2), loss_function=bad)
    with pytest.raises(NotFiniteError, match=r"at step 0 for held-out pairs \[honest-2\]"):
        train(run)


def test_a_last_step_that_overflows_is_found_out() -> None:
    model = torch.nn.Linear(2, 1)
    guard = RefuseNotFinite("policy x", [])
    guard.on_train_end(None, None, None, model=model)
    model.weight.data[0, 1] = float("inf")
    with pytest.raises(NotFiniteError, match="policy x: its weights are not finite: 1 of 2 tensors"):
        guard.on_train_end(None, None, None, model=model)


class Spread:
    """A gradient or parameter of which this process holds a part, as a DTensor does."""

    def __init__(self, part: Tensor) -> None:
        self.part = part

    def to_local(self) -> Tensor:
        return self.part


def spread_model(*parts: list[float]) -> SimpleNamespace:
    parameters = [SimpleNamespace(grad=Spread(torch.tensor(part))) for part in parts]
    return SimpleNamespace(parameters=lambda: parameters)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_all_processes_stop_where_one_has_a_part_that_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    asked = []

    def other_process(answer: Tensor, op: object) -> None:
        asked.append(int(answer))
        answer.fill_(min(int(answer), int(elsewhere)))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", other_process)
    guard, state = RefuseNotFinite("policy x", [["a", "b"]]), SimpleNamespace(global_step=0)
    own = spread_model([1.0, -2.0], [])  # of a head with one row other processes have nothing
    if elsewhere:
        guard.on_pre_optimizer_step(None, state, None, model=own)
    else:
        with pytest.raises(NotFiniteError, match=r"not finite at step 1, of the pairs \[a, b\]"):
            guard.on_pre_optimizer_step(None, state, None, model=own)
    with pytest.raises(NotFiniteError):
        guard.on_pre_optimizer_step(None, state, None, model=spread_model([1.0], [float("nan")]))
    assert asked == [1, 0]

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    weights = SimpleNamespace(parameters=lambda: [Spread(torch.ones(2)), Spread(torch.ones(0))])
    if elsewhere:
        guard.on_train_end(None, None, None, model=weights)
    else:
        with pytest.raises(NotFiniteError, match="policy x: its weights are not finite"):
            guard.on_train_end(None, None, None, model=weights)


def test_a_norm_of_zero3_that_is_not_finite_stops_before_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    guard, state = RefuseNotFinite("policy x", [["a"], ["b"]]), SimpleNamespace(global_step=2)
    guard.on_log(None, state, None, {"grad_norm": float("nan")})  # elsewhere the step itself is refused
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    guard.on_log(None, state, None, {"grad_norm": 1.0})
    guard.on_log(None, state, None, {"eval_loss": 1.0})
    with pytest.raises(
        NotFiniteError, match=r"at step 2, of the pairs \[b\]; nothing of this step was saved"
    ):
        guard.on_log(None, state, None, {"grad_norm": float("inf")})
    parts = [SimpleNamespace(ds_id=0, ds_tensor=torch.tensor(part)) for part in ([1.0], [float("nan")])]
    with pytest.raises(NotFiniteError, match="its weights are not finite"):
        guard.on_train_end(None, None, None, model=SimpleNamespace(parameters=lambda: parts))


def test_many_rows_are_counted() -> None:
    assert named_rows(["a", "b"]) == "[a, b]"
    assert named_rows([str(i) for i in range(11)]) == "[0, 1, 2, 3, 4, 5, 6, 7 and 3 more]"


# ------------------------------------------------------------------ TRL
def test_the_baseline_stops_at_its_step_instead_of_training_on_nan(tmp_path: Path) -> None:
    base = tiny_causal_lm(tmp_path / "base")
    table = load_file(base / "model.safetensors")
    name = next(key for key in sorted(table) if "down_proj" in key)
    table[name] = torch.full_like(table[name], 3e38)  # finite, and what is computed with it is not
    save_file(table, base / "model.safetensors", metadata={"format": "pt"})
    shared = reward_model_config(tmp_path / "root", base)
    write_prepared(shared.paths, pairs=4)
    training = TrainingConfig(epochs=1.0, pairs_per_device=2, gradient_accumulation_steps=1, max_length=96)
    tuning = TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=1e-3))
    config = PolicyConfig(reward_model_config=shared, tuning=tuning, training=training)
    pairs = trained_on(config)
    with pytest.raises(NotFiniteError) as stop:
        train_trl_dpo(
            config,
            pairs,
            pairs.tokenized,
            load_tokenizer(shared.model, shared.paths),
            directory=tmp_path / "policy",
            log_directory=tmp_path / "logs",
        )
    plan = plan_training(
        [row.shared_length for row in pairs.tokenized.rows],
        pairs.stream,
        training,
        seed=shared.seed,
        processes=1,
    )
    first = [pairs.tokenized.pairs[i].id for i in plan.pairs[0]]
    assert "policy baseline_dpo (TRL): the gradient is not finite at step 1, of the pairs [" in str(
        stop.value
    )
    assert all(name in str(stop.value) for name in first)
    assert not list((tmp_path / "policy").glob("*.safetensors"))

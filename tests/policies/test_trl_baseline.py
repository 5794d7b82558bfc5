"""What TRL's trainer is given: our pairs, in the order every method sees them, with nothing of a response cut."""

import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_causal_lm
from tiny_policies import trained_on
from tiny_workspace import reward_model_config, write_prepared
from transformers import TrainerCallback

from prmd.config.policy import PolicyConfig
from prmd.config.shared import LoraConfig, TrainingConfig, TuningConfig
from prmd.errors import ConfigError, StoppedError
from prmd.evaluation.frontier import checkpoint_candidates
from prmd.inference.candidates import Candidate
from prmd.models.loading import load_causal_lm, load_tokenizer
from prmd.models.sequence_models import SequenceLogps
from prmd.pairs import PreferencePair
from prmd.policies import trl_baseline
from prmd.policies.pairs import PolicyPairs, TokenizedPairs
from prmd.policies.targets import policy_loss
from prmd.policies.trl_baseline import baseline_rows, equal_batches, train_trl_dpo
from prmd.training import run as training_run
from prmd.training.batches import MicroBatch, StepSize, TrainingPlan, plan_run
from prmd.training.checkpoints import TRAINER_FILES, Trained, name_checkpoints, trained_once
from prmd.training.run import TrainingRun, run_training
from prmd.training.trainer import PairData

EPOCHS, PER_DEVICE, ACCUMULATION = 2.0, 3, 2
TIMES = {"tokens_per_second"} | {
    f"{kind}_{name}"
    for kind in ("train", "eval")
    for name in ("runtime", "samples_per_second", "steps_per_second")
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PolicyConfig:
    root = tmp_path_factory.mktemp("baseline")
    shared = reward_model_config(root / "root", tiny_causal_lm(root / "base"))
    write_prepared(shared.paths, pairs=5)
    return PolicyConfig(
        reward_model_config=shared,
        tuning=TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=1e-2)),
        training=TrainingConfig(
            epochs=EPOCHS,
            pairs_per_device=PER_DEVICE,
            gradient_accumulation_steps=ACCUMULATION,
            max_length=75,  # some prompts are shortened
            logging_steps=1,
            checkpoints=(1.0,),
        ),
    )


@pytest.fixture(scope="module")
def pairs(config: PolicyConfig) -> PolicyPairs:
    return trained_on(config)


def pair(i: int) -> PreferencePair:
    return PreferencePair(str(i), ({"role": "user", "content": f"q{i}"},), f"c{i}", f"r{i}", "s", "helpful")


def test_rows_follow_the_plan_and_are_messages() -> None:
    batches = [MicroBatch((2, 0)), MicroBatch((1,)), MicroBatch((1,), weight=0.0), MicroBatch((2, 2))]
    rows = baseline_rows([pair(i) for i in range(3)], batches)
    assert [row["chosen"][0]["content"] for row in rows] == ["c2", "c0", "c1", "c2", "c2"]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "q2"}],
        "chosen": [{"role": "assistant", "content": "c2"}],
        "rejected": [{"role": "assistant", "content": "r2"}],
    }


def train(
    config: PolicyConfig,
    pairs: PolicyPairs,
    directory: Path,
    log_directory: Path,
    held_out: TokenizedPairs | None = None,
) -> Trained:
    return train_trl_dpo(
        config,
        pairs,
        pairs.tokenized if held_out is None else held_out,
        load_tokenizer(config.shared.model, config.paths),
        directory=directory,
        log_directory=log_directory,
    )


@pytest.mark.parametrize(
    ("size", "most", "expected"),
    [(StepSize(32, 8), 4, 4), (StepSize(32, 11), 3, 2), (StepSize(32, 4, 2), 4, 4), (StepSize(6, 1), 8, 6)],
)
def test_batches_of_trl_divide_a_step(size: StepSize, most: int, expected: int) -> None:
    assert equal_batches(size, most) == expected


def test_a_step_that_trl_cannot_share_out_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"got 32 pairs on 3 processes, wanted a multiple of 3.*set 30 or 33"
    ):
        equal_batches(StepSize(32, 3, 3), 4)


class CaughtError(Exception):
    """Thrown by a stand-in that has seen what it should see."""


def caught_arguments(
    config: PolicyConfig, pairs: PolicyPairs, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The arguments that DPOTrainer's constructor is called with."""
    found: dict[str, Any] = {}

    def stand_in(**arguments: Any) -> None:
        found.update(arguments)
        raise CaughtError

    monkeypatch.setattr(trl_baseline, "_WatchedTrainer", stand_in)
    with pytest.raises(CaughtError):
        train(config, pairs, Path(config.shared.artifact_root), config.paths.logs("t"))
    return found


def test_trl_gets_the_pairs_in_the_order_our_trainer_sees_them(
    config: PolicyConfig, pairs: PolicyPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = caught_arguments(config, pairs, monkeypatch)
    plans: list[TrainingPlan] = []

    def caught_plan(*arguments: Any, **keywords: Any) -> TrainingPlan:
        plans.append(plan_run(*arguments, **keywords))
        raise CaughtError

    monkeypatch.setattr(training_run, "plan_run", caught_plan)
    tokenized = pairs.tokenized
    run = TrainingRun(
        name="t", directory=config.paths.policies, shared=config.shared, tuning=config.tuning, training=config.training,
        data=PairData(tokenized.rows, {}), stream=pairs.stream, eval_data=None,
        loss_function=lambda logps, columns: policy_loss(logps, columns, config.policy),
        load_model=lambda master: SequenceLogps(load_causal_lm(config.shared.model, config.paths)),
        log_directory=config.paths.logs("t"), task="policy",
    )  # fmt: skip
    with pytest.raises(CaughtError):
        run_training(run, load_tokenizer(config.shared.model, config.paths))
    ours = [tokenized.pairs[i] for micro in plans[0].batches for i in micro.rows]
    dataset = found["train_dataset"]
    assert len(dataset) == len(ours) == 30
    for row, expected in zip(dataset, ours, strict=True):
        assert row["prompt"] == [dict(m) for m in expected.prompt]
        assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == (
            expected.chosen,
            expected.rejected,
        )
    arguments = found["args"]
    assert arguments.train_sampling_strategy == "sequential" and arguments.precompute_ref_log_probs
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (
        PER_DEVICE,
        ACCUMULATION,
    )
    assert arguments.learning_rate == 1e-2 and arguments.beta == config.policy.beta


def test_prompts_are_fitted_so_that_no_response_is_cut(config: PolicyConfig, pairs: PolicyPairs) -> None:
    assert pairs.tokenized.truncated > 0
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    for row in baseline_rows(pairs.tokenized.pairs, [MicroBatch(tuple(range(len(pairs.tokenized.pairs))))]):
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True, return_dict=False)
            assert len(whole) <= config.training.max_length + trl_baseline.TEMPLATE_TAIL


def test_sharded_weights_are_gathered_by_every_process_before_one_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, saved = {"w": torch.ones(1)}, []
    model = SimpleNamespace(save_pretrained=lambda folder, state_dict: saved.append(state_dict))
    accelerator = SimpleNamespace(get_state_dict=lambda wrapped: whole, unwrap_model=lambda wrapped: model)
    trainer = SimpleNamespace(accelerator=accelerator, model=model, model_wrapped=model)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    trl_baseline._save(trainer, tokenizer, tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trl_baseline._save(trainer, tokenizer, tmp_path)
    assert saved == [None, whole]


def test_several_processes_read_one_file_and_find_beside_it_what_trl_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL caches reference log-probabilities in the main process: of rows in memory, where no other process looks."""
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(3)]
    folder = tmp_path / trl_baseline.DATASET
    alone = trl_baseline.dataset_of(rows, folder)
    assert alone.to_list() == rows and not folder.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    main = trl_baseline.dataset_of(rows, folder)
    monkeypatch.setenv("RANK", "1")
    other = trl_baseline.dataset_of(rows, folder)
    assert main.to_list() == other.to_list() == rows
    assert main._get_cache_file_path("f") == other._get_cache_file_path("f") == str(folder / "cache-f.arrow")
    trl_baseline.forget_dataset(folder)
    assert folder.exists(), "the main process deletes it"
    monkeypatch.setenv("RANK", "0")
    trl_baseline.forget_dataset(folder)
    assert not folder.exists()


def test_a_training_keeps_every_response_token_and_logs_what_ours_logs(
    config: PolicyConfig, pairs: PolicyPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    original = trl_baseline._WatchedTrainer

    def watched(**arguments: Any) -> Any:
        made.append(original(**arguments))
        return made[-1]

    monkeypatch.setattr(trl_baseline, "_WatchedTrainer", watched)
    curve, _ = train(config, pairs, tmp_path / "out", tmp_path / "logs")
    rows = [row for row in curve if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5) and rows[0]["logratios/chosen"] == 0.0
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["logratios/rejected"] == pytest.approx(row["rewards/rejected"] / config.policy.beta)
    responses = {(r.prompt_ids, y) for r in pairs.tokenized.rows for y in r.responses}
    seen: Counter[bool] = Counter()
    for example in made[0].train_dataset:  # TRL's own tokens: ours, and the newline behind the end of turn
        for side in ("chosen_ids", "rejected_ids"):
            ours = tuple(example["prompt_ids"]), tuple(example[side][:-1])
            seen[ours in responses] += 1
    assert seen == {True: 60}
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert list((tmp_path / "logs").glob("events.out.*"))
    first = torch.tensor([row["learning_rate"] for row in rows])
    assert first.max() == pytest.approx(1e-2)


def test_a_baseline_goes_on_where_it_was_stopped_and_is_not_trained_twice(
    config: PolicyConfig, pairs: PolicyPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_baseline, "reporting_callbacks", lambda *arguments, **keywords: [_Halts(halts)])

    def trained(name: str) -> list[dict[str, float]]:
        return train(config, pairs, tmp_path / name, tmp_path / "logs")[0]

    halts: set[int] = set()
    whole = trained("whole")
    halts.add(2)
    with pytest.raises(StoppedError, match=r"policy baseline_dpo .*stopped; .* continues from step 2"):
        trained("stopped")
    halts.clear()
    resumed = trained("stopped")
    counted = [row["num_tokens"] for row in whole if "num_tokens" in row]
    assert counted[-1] > counted[1] > 0
    for row, expected in zip(resumed, whole, strict=True):
        assert row.keys() == expected.keys()
        timeless = {name: value for name, value in expected.items() if name not in TIMES}
        assert {name: row[name] for name in timeless} == pytest.approx(timeless, rel=1e-5, abs=1e-6)
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("whole", "stopped"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-6) for key in ours)

    def refused() -> Any:
        raise AssertionError("trained again")

    first = trained_once(tmp_path / "stopped", lambda: (resumed, {5: "end"}))
    assert trained_once(tmp_path / "stopped", refused) == first == (resumed, {5: "end"})


def test_watching_held_out_pairs_changes_no_bit_of_the_policy(
    config: PolicyConfig, pairs: PolicyPairs, tmp_path: Path
) -> None:
    """With dropout, which draws from the random numbers that a pass over pairs would use up."""
    lora = config.tuning.lora.model_copy(update={"dropout": 0.3})
    dropping = config.model_copy(update={"tuning": config.tuning.model_copy(update={"lora": lora})})
    tokenized = pairs.tokenized
    for name, watched in (("watched", tokenized), ("alone", replace(tokenized, rows=[], pairs=[]))):
        curve, _ = train(dropping, pairs, tmp_path / name, tmp_path / "logs", watched)
        found = [row for row in curve if "eval_loss" in row]
        assert [row["step"] for row in found] == ([curve[-1]["step"]] if name == "watched" else [])
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("watched", "alone"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_held_out_loss_is_that_of_the_saved_policy(
    config: PolicyConfig, pairs: PolicyPairs, tmp_path: Path
) -> None:
    curve, _ = train(config, pairs, tmp_path / "out", tmp_path / "logs")
    logged = next(row for row in reversed(curve) if "eval_loss" in row)
    base = load_causal_lm(config.shared.model, config.paths)
    policy = PeftModel.from_pretrained(load_causal_lm(config.shared.model, config.paths), tmp_path / "out")

    def logps(model: torch.nn.Module) -> torch.Tensor:
        found = [
            [
                model(torch.tensor([[*row.prompt_ids, *y]])).logits[0, len(row.prompt_ids) - 1 : -1]
                .log_softmax(-1)[range(len(y)), list(y)].sum()
                for y in row.responses
            ]
            for row in pairs.tokenized.rows
        ]  # fmt: skip
        return torch.tensor(found)

    with torch.no_grad():
        logratios = logps(policy.eval()) - logps(base.eval())
    margins = config.policy.beta * (logratios[:, 0] - logratios[:, 1])
    # TRL averages batches; all but the last are of one size
    batches = [-torch.nn.functional.logsigmoid(part).mean() for part in margins.split(PER_DEVICE)]
    assert logged["eval_loss"] == pytest.approx(float(torch.stack(batches).mean()), abs=2e-3)
    assert abs(logged["eval_loss"] - 0.693147) > 0.02


def test_its_checkpoints_are_kept_by_their_shares(
    config: PolicyConfig, pairs: PolicyPairs, tmp_path: Path
) -> None:
    halves = config.training.model_copy(update={"checkpoints": (0.5, 1.0)})
    config, folder = config.model_copy(update={"training": halves}), tmp_path / "policy"
    _, steps = train(config, pairs, folder, tmp_path / "logs")
    assert list(steps.values()) == ["50", "end"]
    name_checkpoints(folder, steps)
    half, end, policy = (
        load_file(place / "adapter_model.safetensors")
        for place in (folder / "checkpoints" / "50", folder / "checkpoints" / "end", folder)
    )
    assert all(torch.equal(end[key], policy[key]) for key in policy)
    assert any(not torch.equal(half[key], policy[key]) for key in policy)
    left = [path.name for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    assert not {*TRAINER_FILES} & set(left) and not list(folder.glob("checkpoint-*"))
    assert not [name for name in left if name.startswith("rng_state")]
    between = checkpoint_candidates(Candidate("baseline_dpo", folder, "key", "embedded"))
    assert [candidate.method for candidate in between] == ["baseline_dpo@50", "baseline_dpo"]


class _Halts(TrainerCallback):
    """Asks its own process to stop, as Ctrl-C does, while these steps are running."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step + 1 in self.steps:
            signal.raise_signal(signal.SIGINT)

"""The run at full size on a tiny shape: its rows, what they count, what a cut or a short run keeps; MFU by hand."""

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_causal_lm, tiny_config
from transformers import LlamaForCausalLM

from benchmarks import full_size
from benchmarks.full_size_parts import page, watch
from benchmarks.full_size_parts.project import made_tokenizer
from benchmarks.full_size_parts.watch import OutOfTimeError, StepWatch, every_trainer_has
from benchmarks.side_by_side.mfu import counted_parameters, mfu, peak_flops
from benchmarks.side_by_side.rows import POLICY, policy_data
from benchmarks.side_by_side.setup import load_workload, model_config, random_models
from benchmarks.side_by_side.trainings import our_training, trl_dpo
from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.errors import ConfigError
from prmd.models.sequence_models import SequenceLogps
from prmd.policies.targets import policy_loss

FACTS = dict.fromkeys(
    ("card", "shape", "torch", "transformers", "trl", "torchao", "driver", "commit", "pairs")
)
COMMON = FACTS | {"run": "now", "cap_gib": None, "processes": 1, "dirty": False}


# ------------------------------------------------------------------ the definition
def test_mfu_by_hand() -> None:
    """The one figure there is of an H100: 11,000 tokens a second of the 3B shape, 2.775e9 weights counted."""
    share = mfu(parameters=2_775_000_000, tokens=22_000, seconds=2.0, card="NVIDIA H100 80GB HBM3")
    assert share == pytest.approx(6 * 2.775e9 * 11_000 / 989e12) == pytest.approx(0.1852, abs=1e-4)
    both = mfu(parameters=100, tokens=50.0, seconds=2.0, card="NVIDIA A100-SXM4-80GB", processes=2)
    assert both == pytest.approx(6 * 100 * 50 / 2 / 312e12 / 2)
    assert mfu(parameters=1, tokens=1, seconds=1, card="NVIDIA TITAN V") is None
    assert mfu(parameters=1, tokens=1, seconds=1, card=None) is None


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_peak_is_that_of_the_card_of_this_very_name(card: str, peak: float | None) -> None:
    assert peak_flops(card) == peak


@pytest.mark.parametrize("tied", [True, False])
def test_the_input_embedding_is_not_counted_and_a_head_of_its_own_is(tied: bool) -> None:
    linear = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # q, o; k, v with two of four heads; gate, up, down
    layers = 2 * (linear + 2 * 32) + 32
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied))
    assert counted_parameters(model) == layers + (0 if tied else 300 * 32)


# ------------------------------------------------------------------ what is watched
def test_tokens_of_a_step_are_those_processed_without_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours processes a prompt once, TRL twice and with what the template puts behind a turn."""
    monkeypatch.setattr(watch, "WARM_STEPS", 1)
    base = model_config(str(tiny_causal_lm(tmp_path / "tiny")))
    workload = load_workload(base, None, 8, max_length=512)
    models = random_models(tiny_config(), dtype=torch.float32, checkpointing=True, pad_token_id=0)
    data = policy_data(workload.policy_rows, torch.zeros(8, 2), targets=False)
    loss = partial(policy_loss, policy=POLICY)
    said: list[tuple[str, float, dict[str, Any]]] = []

    def watched(make: Any) -> StepWatch:
        steps = StepWatch(
            lambda phase, seconds, **facts: said.append((phase, seconds, facts)),
            lambda seconds, tokens, count, largest: {"all": (seconds, tokens, count), "largest": largest},
            lambda: False,
        )
        with every_trainer_has(steps):
            training = make()
        assert training.run() > 0
        return steps

    common = {"workload": workload, "checkpointing": True}
    policy = SequenceLogps(models.policy())
    ours = watched(lambda: our_training(policy, data, loss, directory=tmp_path / "ours", **common))
    rows = workload.policy_rows
    assert ours.tokens == [sum(rows[i].shared_length for i in micro.rows) for micro in workload.plan]
    assert [phase for phase, _, _ in said] == ["held", "first_step", "compile", "step"]
    assert said[0][2] == {"parameters": sum(p.numel() for p in policy.parameters()), "share_of_each": [1.0]}
    assert said[3][1] == ours.seconds[1] and said[3][2]["all"] == (ours.seconds[1], ours.tokens[1], 1)
    assert said[2][1] == max(0.0, ours.seconds[0] - ours.seconds[1])
    padded = {len(m.rows) * max(rows[i].shared_length for i in m.rows): m.rows for m in workload.plan}
    widest = [rows[i] for i in padded[max(padded)]]
    said_by_all = sum(len(response) for row in widest for response in row.responses)
    largest = said[3][2]["largest"]
    assert largest == watch.LargestBatch(4, max(row.shared_length for row in widest), 8, said_by_all)
    assert (largest.pairs, largest.row().shared_length) == (4, largest.width)
    assert len(largest.row().prompt_ids) == largest.width - said_by_all // 4
    trl = watched(lambda: trl_dpo(models.policy(), workload, tmp_path / "trl", checkpointing=True))
    twice = [2 * len(row.prompt_ids) + sum(map(len, row.responses)) for row in workload.reward_rows]
    assert sum(trl.tokens) == sum(twice) and trl.largest is None
    apart = watch.LargestBatch(sequences=6, width=50, responses=6, predicted=120)
    assert (apart.pairs, apart.row().longest, len(apart.row().prompt_ids)) == (3, 50, 30)


def test_a_call_within_another_counts_for_the_inner_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LEAST_SECONDS", 0.0)
    said: list[str] = []
    seconds = watch.Watch(lambda phase, seconds, **_: said.append(phase))
    inner = seconds._timed("hash", lambda: time.sleep(0.05))
    outer = seconds._timed("save", lambda: (inner(), time.sleep(0.02)))
    begin = time.perf_counter()
    outer()
    assert sum(seconds.seconds.values()) == pytest.approx(time.perf_counter() - begin, abs=0.005)
    assert seconds.seconds["hash"] >= 0.05 > seconds.seconds["save"] and said == ["hash", "save"]


def test_every_id_of_a_vocabulary_can_be_read() -> None:
    tokenizer = made_tokenizer(["why is the sky blue?", "the sky is not blue"] * 3, 400)
    assert len(tokenizer) == 400 and all(tokenizer.decode([i]) for i in range(3, 400))
    text = "why is the sky é blue?"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and max(ids) < 300


# ------------------------------------------------------------------ time
def quiet_steps() -> StepWatch:
    return StepWatch(lambda *_, **__: None, lambda *_: {}, lambda: False)


def test_what_does_not_fit_is_skipped_and_what_fails_does_not_end_the_run(tmp_path: Path, capsys) -> None:
    run = full_size.Run(tmp_path / "rows.jsonl", minutes=1.0, common=COMMON)
    done: list[str] = []

    def fail(error: Exception) -> None:
        raise error

    run.stage("reward_model", lambda: fail(ConfigError("tuning.optimizer: no\nmore")), quiet_steps)
    run.stage("policy", lambda: fail(OutOfTimeError("stopped after step 3 of 12")), quiet_steps)
    run.longest = 100.0
    run.stage("baseline", lambda: done.append("begun"), quiet_steps)
    rows = io.read_jsonl(tmp_path / "rows.jsonl")
    assert [(row["stage"], row["phase"]) for row in rows] == [
        ("reward_model", "failed"),
        ("policy", "cut"),
        ("baseline", "skipped"),
    ]
    assert rows[0]["note"] == "tuning.optimizer: no more" and run.failed and not done
    printed = capsys.readouterr().out
    assert "100 s are needed" in printed and "s of 1 minutes are left" in printed


def test_a_training_stops_between_two_steps_when_time_is_over(tmp_path: Path) -> None:
    base = model_config(str(tiny_causal_lm(tmp_path / "tiny")))
    workload = load_workload(base, None, 8, max_length=512)
    data = policy_data(workload.policy_rows, torch.zeros(8, 2), targets=False)
    models = random_models(tiny_config(), dtype=torch.float32, checkpointing=False, pad_token_id=0)
    said: list[str] = []
    steps = StepWatch(lambda phase, *_, **__: said.append(phase), lambda *_: {}, lambda: True)
    policy, loss = SequenceLogps(models.policy()), partial(policy_loss, policy=POLICY)
    with every_trainer_has(steps):
        training = our_training(
            policy, data, loss, workload=workload, directory=tmp_path / "ours", checkpointing=False
        )
    with pytest.raises(OutOfTimeError, match="stopped after step 1 of 2"):
        training.run()
    assert said == ["held", "first_step"]


# ------------------------------------------------------------------ the whole
def command(tmp_path: Path) -> list[str]:
    return ["--json", str(tmp_path / "rows.jsonl"), "--work", str(tmp_path / "work"), "--shape", "tiny"]


def test_all_stages_run_and_every_phase_has_its_row(tmp_path: Path, capsys) -> None:
    full_size.main(command(tmp_path))
    rows = io.read_jsonl(tmp_path / "rows.jsonl")
    of = {(row["stage"], row["phase"]): row for row in rows}
    assert rows[0]["phase"] == "make" and rows[1]["phase"] == "prepare" and rows[1]["note"] == "160 pairs"
    for stage in (full_size.REWARD_MODEL, full_size.POLICY, full_size.BASELINE):
        assert {"held", "first_step", "compile", "step", "total"} <= {p for s, p in of if s == stage}
        step, total = of[stage, "step"], of[stage, "total"]
        assert step["tokens_per_second"] > step["tokens_per_step"] / step["slowest"] * 0.99 > 0
        assert step["mfu"] is None and step["peak_bytes"] is None
        assert (step["planned_bytes"] is None) == (stage == full_size.BASELINE)
        parts = total["parts"]
        assert all(parts[name] > 0 for name in ("load", "save", "hash", "check", "steps", "other"))
        assert sum(parts.values()) == pytest.approx(total["seconds"], abs=0.05)
    assert all(
        of[stage, "total"]["parts"][p] > 0
        for stage in ("reward_model", "policy")
        for p in ("score", "sample")
    )
    # per layer: q, o; k, v of two of four heads, with biases on q, k and v; gate, up, down; two norms
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 32 + 2 * 16 + 3 * 32 * 64 + 2 * 32
    assert of["policy", "step"]["counted_parameters"] == 2 * layer + 32
    assert of["reward_model", "step"]["counted_parameters"] == 2 * layer + 32 + 32  # the scalar head
    printed = capsys.readouterr().out
    assert all(page.line(row) in printed for row in rows) and "MFU left out" in printed
    assert page.page(rows) == (tmp_path / "rows.md").read_text(encoding="utf-8")
    assert not (tmp_path / "work").exists()


def test_a_run_that_is_killed_keeps_the_rows_it_had(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    script = PROJECT_ROOT / "benchmarks" / "full_size.py"
    process = subprocess.Popen(
        [sys.executable, str(script), *command(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 240
        while not (file.is_file() and len(io.read_jsonl(file)) >= 2):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (-signal.SIGKILL, 1)
    rows = io.read_jsonl(file)
    assert [row["phase"] for row in rows[:2]] == ["make", "prepare"]
    assert "| data | prepare |" in (tmp_path / "rows.md").read_text(encoding="utf-8") or len(rows) == 2

"""The speed comparison on a tiny model: both sides do the same work, the rows are complete, the arithmetic is right."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_causal_lm, tiny_config

from benchmarks import speed
from benchmarks.side_by_side.limit import DenseBatch, alternate, dense_batches
from benchmarks.side_by_side.memory import memory_row
from benchmarks.side_by_side.rows import POLICY, ROW_KEYS, make_row, policy_data, ratio, timed_values
from benchmarks.side_by_side.setup import (
    PAIRS_PER_BATCH,
    Workload,
    choose_batches,
    load_workload,
    model_config,
    processed_tokens,
    random_models,
    read_candidates,
)
from benchmarks.side_by_side.shape import shape_rows, training_flops
from benchmarks.side_by_side.trainings import our_scoring, our_training, trl_dpo
from prmd.artifacts.io import read_jsonl
from prmd.config.shared import DataConfig
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.policies.targets import policy_loss

ONCE = speed.Preset(4, {name: (1, math.inf) for name in speed.QUICK.limits})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_causal_lm(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def workload(model: str) -> Workload:
    return load_workload(model_config(model), None, 8, max_length=speed.MAX_LENGTH)


def row_of(length: int) -> PrefixRow:
    return PrefixRow((1,) * (length - 4), ((2, 3), (4, 5)))


def test_every_row_is_measured_and_printed(model: str) -> None:
    rows = list(speed.measure(model, None, ONCE, vocabulary=500))
    assert [row["name"] for row in rows] == ["dpo", "scoring", "distillation", "reward_model", "memory"]
    assert all(set(ROW_KEYS) | {"missed", "hardware", "versions"} == set(row) for row in rows)
    by_name = {row["name"]: row for row in json.loads(json.dumps(rows))}
    for name in ("dpo", "reward_model"):
        row = by_name[name]
        assert row["speed_ratio"] == pytest.approx(row["ours"] / row["trl"])
        assert row["trl_tokens_per_pair"] > row["tokens_per_pair"] > 0
        assert row["repeats"] == 1 and row["fraction_of_limit"] > 0
    assert by_name["distillation"]["trl"] is None and by_name["distillation"]["ours"] > 0
    assert all(speed.table_line(row).startswith(f"| {name} |") for name, row in by_name.items())
    assert all(speed.table_line(row).count("|") == speed.HEAD[0].count("|") for row in rows)
    assert speed.below(rows).count("MISSED") == sum(len(row["missed"]) for row in rows)


def test_named_rows_alone_are_measured(model: str) -> None:
    rows = list(speed.measure(model, None, ONCE, names=("dpo", "scoring"), vocabulary=500))
    assert [row["name"] for row in rows] == ["dpo", "scoring"]
    rows = list(speed.measure(model, None, ONCE, names=("dpo", "distillation"), vocabulary=500))
    assert [row["name"] for row in rows] == ["dpo", "distillation"]
    rows = list(speed.measure(model, None, ONCE, names=("memory",), vocabulary=500))
    assert [row["name"] for row in rows] == ["memory"]


def test_rows_and_repeats_come_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(speed, "measure", lambda *args, **named: asked.append((args, named)) or ())
    speed.main(["--rows", "dpo", "memory", "--repeats", "2"])
    ((_, _, preset), named) = asked[0]
    assert named == {"names": ["dpo", "memory"]} and preset.pairs == speed.FULL.pairs
    assert {limit[0] for limit in preset.limits.values()} == {2}
    speed.main(["--quick"])
    assert asked[1][0][2] == speed.QUICK and asked[1][1] == {"names": speed.ROWS}
    with pytest.raises(SystemExit):
        speed.main(["--rows", "scoring"])
    assert "measured with dpo" in capsys.readouterr().err


def test_a_run_that_is_cut_keeps_the_rows_it_had(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    def cut(*_: object, **__: object) -> Iterator[dict[str, object]]:
        for name in ("dpo", "scoring"):
            yield make_row(name, unit="pairs/s", ours=2.0)
            assert f"| {name} | pairs/s | 2 |" in capsys.readouterr().out, "printed before the next one"
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "measure", cut)
    file = tmp_path / "rows.jsonl"
    for names in (["dpo", "scoring"], ["dpo", "scoring"] * 2):
        with pytest.raises(KeyboardInterrupt):
            speed.main(["--json", str(file)])
        assert [row["name"] for row in read_jsonl(file)] == names, "behind those of earlier runs"


def test_both_sides_take_the_same_steps_from_the_same_loss(
    model: str, workload: Workload, tmp_path: Path
) -> None:
    models = random_models(tiny_config(), dtype=torch.float32, checkpointing=False, pad_token_id=0)
    policy = SequenceLogps(models.policy())
    _, logps = our_scoring(policy.model, workload, tmp_path / "table")
    ours = our_training(
        policy,
        policy_data(workload.policy_rows, torch.stack(logps), targets=False),
        partial(policy_loss, policy=POLICY),
        workload=workload,
        directory=tmp_path / "ours",
        checkpointing=False,
    )
    trl = trl_dpo(models.policy(), workload, tmp_path / "trl", checkpointing=False)
    for training in (ours, trl):
        assert training.run() > 0
        assert training.trainer.state.global_step == 2
        assert training.trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert ours.run() > 0, "a training can be run again"


def test_peak_memory_holds_weights_gradients_and_states(workload: Workload) -> None:
    row = memory_row(workload, vocabulary=400)
    states = 4 * 4 * 400 * 64  # four float32 copies of the embedding alone
    assert row["ours"] > states and row["trl"] > states
    assert row["memory_ratio"] == row["ours"] / row["trl"]


def test_a_shape_is_compared_within_its_cap(workload: Workload) -> None:
    rows = list(shape_rows(tiny_config(), workload.first(4), name="tiny", dtype=torch.float32, repeats=1))
    assert [row["name"] for row in rows] == ["dpo_tiny", "reward_model_tiny"]
    assert all(row["speed_ratio"] > 0 and "did not fit" not in row["note"] for row in rows)


# ------------------------------------------------------------------ workload
def test_batches_stand_for_all_lengths() -> None:
    rows = [row_of(length) for length in range(10, 394)]  # twelve whole steps of 32
    batches = choose_batches(rows, 5)
    middles = sorted(sum(rows[i].shared_length for i in batch) / PAIRS_PER_BATCH for batch in batches)
    assert middles == pytest.approx([47.5, 123.5, 203.5, 279.5, 355.5])
    assert all(max(batch) - min(batch) == PAIRS_PER_BATCH - 1 for batch in batches)


def test_tokens_are_counted_with_each_prompt_once() -> None:
    rows = [row_of(10), row_of(13)]
    assert processed_tokens(rows, [(0, 1)], share_prompt=True) == (26, 3)
    assert processed_tokens(rows, [(0, 1)], share_prompt=False) == (4 * 11, 2 * 3)


def test_dense_batches_hold_the_distinct_tokens() -> None:
    rows = [row_of(10), row_of(14)]
    assert dense_batches(rows, [(0, 1)]) == [DenseBatch(rows=2, width=12, outputs=8)]
    assert dense_batches(rows, [(0, 1)], rewards=True)[0].outputs == 4


def test_pairs_come_from_a_folder_in_the_hub_layout(tmp_path: Path) -> None:
    transcript = "\n\nHuman: Is it {}?\n\nAssistant: {}"
    lines = [
        json.dumps({"chosen": transcript.format(i, "Yes."), "rejected": transcript.format(i, "No.")})
        for i in range(3)
    ]
    folder = tmp_path / "harmless-base"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    pairs, source = read_candidates(str(tmp_path), DataConfig())
    assert [pair.chosen for pair in pairs] == ["Yes."] * 3 and source == "HH-RLHF harmless-base/train"
    assert read_candidates(None, DataConfig())[1].startswith("the embedded harmless pairs")


# ------------------------------------------------------------------ arithmetic
def test_runs_alternate_and_stop_in_time() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or 1.0 for name in ("ours", "trl")}
    assert alternate(runs, repeats=3) == {"ours": [1.0] * 3, "trl": [1.0] * 3}
    assert order == ["ours", "trl", "trl", "ours", "ours", "trl"]
    assert alternate(runs, repeats=3, seconds=0.0) == {"ours": [1.0], "trl": [1.0]}


def test_ratios_are_taken_within_a_repeat() -> None:
    times = {"ours": [1.0, 2.0, 4.0], "trl": [4.0, 10.0, 8.0], "limit": [0.9, 1.8, 3.6]}
    values = timed_values(times, amount=8.0, distinct=90, dense=[DenseBatch(1, 100, 1)])
    assert (values["speed_ratio"], values["spread"]) == (4.0, [2.0, 5.0])
    assert (values["ours"], values["trl"]) == (4.0, 1.0)
    assert values["fraction_of_limit"] == pytest.approx(0.81)
    assert ratio([math.nan, 6.0], [1.0, 2.0]) == (3.0, [3.0, 3.0])
    value, spread = ratio([math.nan], [1.0])
    assert math.isnan(value) and spread is None


def test_a_missed_target_is_said_with_its_distance() -> None:
    row = make_row("dpo", speed_ratio=2.8, padding_share=0.04, fraction_of_limit=math.nan)
    target = speed.SPEED_TARGETS[speed.get_device().type]["dpo"]
    missed = speed.misses(row)
    assert len(missed) == (1 if target > 2.8 else 0)
    assert speed.misses(make_row("memory", memory_ratio=0.9)) == [
        "memory_ratio 0.9, wanted at most 0.6: off by 50%"
    ]
    assert speed.misses(make_row("memory", memory_ratio=0.6)) == []


def test_flops_are_six_per_weight_and_token() -> None:
    config = tiny_config()
    linear = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # q, o; k, v with two of four heads; gate, up, down
    weights = 2 * (linear + 2 * 32) + 32  # two layers with their norms, the last norm
    head = 300 * 32
    dense = [DenseBatch(rows=2, width=5, outputs=3)]
    assert training_flops(config, dense, head=True) == 6.0 * (weights * 10 + head * 3)
    assert training_flops(config, dense, head=False) == 6.0 * weights * 10

"""Hours of the configured trainings from measured speeds, against arithmetic done by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config

from benchmarks import hours
from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT
from prmd.config.loading import load_config
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError

CONFIG = RewardModelConfig()
SHIPPED = load_config(CONFIG_DIR, PolicyConfig)
COMMON = {"hardware": "a test machine", "versions": "torch 0", "tokens_per_pair": 200.0}


def row(name: str, pairs_per_second: float | None, model: str) -> dict[str, Any]:
    return COMMON | {"name": name, "ours": pairs_per_second, "model": model}


def shape_rows() -> list[dict[str, Any]]:
    return [row("dpo_qwen2.5_3b_shape", 4.0, "Qwen2"), row("reward_model_qwen2.5_3b_shape", 5.0, "Qwen2")]


def test_pairs_are_those_of_the_data_sets_without_what_is_held_out() -> None:
    pairs = hours.train_pairs(CONFIG)
    assert pairs["helpful"] == round(0.85 * (43_835 + 22_007 + 52_421))
    assert pairs["harmless"] == round(0.85 * 42_537)
    assert pairs["honest"] == round(0.75 * 817 * 0.5 * 3)
    limited = CONFIG.model_copy(
        update={"data": CONFIG.data.model_copy(update={"max_pairs_per_objective": 1000})}
    )
    assert hours.train_pairs(limited) == {"helpful": 1000, "harmless": 1000, "honest": 919}


def test_measured_rows_of_the_shape_are_taken_as_they_are() -> None:
    rows = [*shape_rows(), row("dpo", 1e9, "small"), row("reward_model", 1e9, "small")]
    made = hours.stages(CONFIG, PolicyConfig(), pairs_rm=1800, pairs_policy=7200)
    found, sources = hours.speeds(rows, made, CONFIG)
    taken = [stage.hours(speed) for stage, speed in zip(made, found, strict=True)]
    epochs = CONFIG.training.epochs
    assert [stage.name for stage in made[:3]] == [
        f"reward model, {o}" for o in ("helpful", "harmless", "honest")
    ]
    # 5 pairs of 200 tokens a second were measured; the data's pairs have more tokens, or fewer
    hours_rm = [1800 * epochs * tokens / (5.0 * 200) / 3600 for tokens in (319, 237, 68)]
    assert taken[:3] == pytest.approx(hours_rm)
    hours_policy = 7200 * (319 + 237 + 68) / 3 / (4.0 * 200) / 3600
    assert taken[3:] == pytest.approx([hours_policy] * 4, rel=1e-4)
    assert made[3].tokens == pytest.approx(7200 * 208, rel=1e-4) and found[3] == 800
    text = hours.table(made, found, sources)
    assert "measured at random weights of Qwen2.5-3B's shape" in text and "NOT MEASURED" not in text
    assert f"| {sum(hours_rm) + 4 * hours_policy:.2g} |" in next(
        line for line in text.splitlines() if line.startswith("| all")
    )


def test_by_default_heads_keep_their_share_and_policies_take_all() -> None:
    made = hours.stages(CONFIG, PolicyConfig())
    pairs = hours.train_pairs(CONFIG)
    assert made[0].pairs == round(0.9 * pairs["helpful"])
    assert made[5].pairs == sum(pairs.values())
    names = [stage.name for stage in made[3:]]
    assert names == [f"policy, {m}" for m in ("baseline_dpo", "hard_min", "cvar", "hierarchical")]


def test_pairs_of_an_objective_are_repeated_no_more_often_than_configured() -> None:
    """Ten passes over the 919 honest pairs; what is left over is halved between the other two objectives."""
    limited = PolicyConfig.model_validate({"pairs": {"max_repeats": 10}})
    others = (sum(hours.train_pairs(CONFIG).values()) - 9190) / 2
    tokens = others * (319 + 237) + 9190 * 68
    assert hours.stages(CONFIG, limited)[3].tokens == pytest.approx(tokens, rel=1e-4)


def test_a_smaller_model_gives_hours_that_are_called_computed(tmp_path: Path) -> None:
    """6 operations per weight and token of the layers; the head runs for the response tokens of policies alone."""
    small = tiny_config(hidden_size=64, intermediate_size=128, num_hidden_layers=3, vocab_size=1000)
    small.save_pretrained(tmp_path / "small")
    model = str(tmp_path / "small")
    rows = [row("dpo", 10.0, model), row("reward_model", 10.0, model)]
    made = hours.stages(CONFIG, PolicyConfig(), pairs_rm=10, pairs_policy=10)
    found, sources = hours.speeds(rows, made, CONFIG)

    def layers(hidden: int, inner: int, key_value: int, count: int, biases: int) -> int:
        return (
            count * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner + 2 * hidden + biases)
            + hidden
        )

    own = layers(64, 128, 32, 3, 0)
    large = layers(2048, 11_008, 256, 36, 2048 + 512)
    share = round(1000 * (161 + 92 + 24) / (319 + 237 + 68)) / 1000
    assert found[0] == pytest.approx(2000 * own / large)
    assert found[3] == pytest.approx(2000 * (own + share * 64_000) / (large + share * 2048 * 151_936))
    text = hours.table(made, found, sources)
    assert text.count("COMPUTED, NOT MEASURED") == 2 and "a test machine" in text


def full_size_row(stage: str, tokens_per_second: float, **changes: Any) -> dict[str, Any]:
    facts = {"stage": stage, "phase": "step", "shape": "qwen2.5-3b", "seconds": 0.7, "card": "a card"}
    facts |= {"tokens_per_second": tokens_per_second, "cap_gib": 31.3, "processes": 1, "commit": "abc"}
    return facts | dict.fromkeys(("torch", "transformers", "trl"), "9") | changes


def test_rows_of_the_stages_themselves_come_first_and_the_newest_counts() -> None:
    rows = [
        *shape_rows(),
        full_size_row("reward_model", 1.0),
        full_size_row("reward_model", 9000.0),
        full_size_row("policy", 6000.0),
        full_size_row("policy", 2.0, phase="first_step"),
        full_size_row("baseline", 3.0),
        full_size_row("policy", 4.0, shape="tiny"),
        {"stage": "base", "phase": "make", "seconds": 1.0},
    ]
    made = hours.stages(CONFIG, PolicyConfig())
    found, sources = hours.speeds(rows, made, CONFIG)
    assert found == [9000.0] * 3 + [6000.0] * 4
    lines = hours.table(made, found, sources).splitlines()
    tokens = round(0.9 * hours.train_pairs(CONFIG)["harmless"]) * 3 * 237
    assert f"| {tokens / 1e6:.1f} | 9e+03 | {tokens / 9000 / 3600:.2g} |" in lines[3]
    assert lines[-1].startswith("* policy: measured") and "1 x a card, capped at 31.3 GiB" in lines[-1]


def test_without_rows_hours_are_assumed_and_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    """6 N tokens, N of the 3B shape counted by hand: 36 layers and the last norm, without the tied embedding."""
    hours.main([])
    printed = capsys.readouterr().out
    layer = 2 * 2048 * 2048 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11_008 + 2 * 2048
    counted = 36 * layer + 2048
    tokens = sum(stage.tokens for stage in hours.stages(CONFIG, SHIPPED))
    at = [6 * counted * tokens / (share * 209.5e12) / 3600 for share in (0.2, 0.3, 0.4)]
    cells = " | ".join(f"{value:.2g}" for value in at)
    assert f"| all |  | {tokens / 1e6:.1f} | {6 * counted * tokens / 1e18:.3g} | {cells} |" in printed
    assert "ASSUMED, NOT MEASURED: NVIDIA GeForce RTX 5090" in printed
    page = (PROJECT_ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    table = printed.partition("\n\n")[0]
    assert table in page, "the page holds what this prints"


def test_missing_rows_and_files_are_named(tmp_path: Path) -> None:
    made = hours.stages(CONFIG, PolicyConfig())
    with pytest.raises(DataError, match="no row of 'dpo'"):
        hours.speeds(shape_rows()[1:], made, CONFIG)
    with pytest.raises(DataError, match="no row of 'reward_model'"):
        hours.speeds([row("reward_model", None, "x")], made, CONFIG)
    with pytest.raises(
        DataError, match=r"none.json is not there; make it with `python benchmarks/full_size.py"
    ):
        hours.main(["--rows", str(tmp_path / "none.json")])


def test_command_line_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in shape_rows()), encoding="utf-8")
    hours.main(["--rows", str(file), "--pairs-rm", "3600", "--pairs-policy", "14400"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| training | pairs |")
    assert "| policy, cvar | 14,400 | 1 | 3.0 | 800 | 1 |" in lines

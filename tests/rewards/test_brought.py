"""Rewards that the user brings: the function's file, what it may return, the rows it reads, its cache, and its copies."""

from pathlib import Path

import numpy as np
import pytest
import torch

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import BroughtConfig
from prmd.errors import ConfigError, DataError, NotFiniteError
from prmd.inference.cache import ScoreTable
from prmd.pairs import PreferencePair
from prmd.pessimism.aggregation import Aggregation, Parameters, robust_rewards
from prmd.pessimism.calibration import calibrate, fit_calibration
from prmd.rewards.brought import BroughtReward
from prmd.rewards.functions import RewardFunction, load_function

ASKED = ({"role": "user", "content": "Why is the sky blue?"},)


def function_of(folder: Path, text: str, name: str = "concise") -> RewardFunction:
    path = folder / "my_rewards.py"
    path.write_text(text, encoding="utf-8")
    return load_function(f"{path}:{name}", "data.own_pairs.rewards.length.function")


def brought(
    folder: Path, function: RewardFunction | None, source: BroughtConfig | None = None
) -> BroughtReward:
    source = source or BroughtConfig(function="my_rewards.py:concise")
    return BroughtReward(folder / "length_rm", "length", source, function, ArtifactPaths(folder, "own_pairs"))


def pairs_of(n: int, **rewards: list[float]) -> list[PreferencePair]:
    return [
        PreferencePair(f"p{i}", ASKED, "a" * (i + 1), "b", "mine:1", "polite", rewards=rewards)
        for i in range(n)
    ]


# ------------------------------------------------------------------ the file
def test_a_function_reads_messages_and_text_and_cannot_change_the_prompt(tmp_path: Path) -> None:
    text = "def concise(prompt, response):\n    n = len(prompt[-1]['content'])\n    prompt.clear()\n    return n + len(response)"
    function = function_of(tmp_path, text)
    assert function(ASKED, "four", "x") == len("Why is the sky blue?") + 4
    assert ASKED[0]["content"] and not list(tmp_path.glob("__pycache__"))


@pytest.mark.parametrize("value", ["np.float32(2)", "2", "np.int64(2)", "Fraction(2)"])
def test_any_number_is_one(tmp_path: Path, value: str) -> None:
    text = f"import numpy as np\nfrom fractions import Fraction\ndef concise(p, r): return {value}"
    assert function_of(tmp_path, text)(ASKED, "x", "x") == 2.0


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("True", DataError),
        ("[1]", DataError),
        ("10 ** 400", NotFiniteError),
        ("float('-inf')", NotFiniteError),
    ],
)
def test_what_is_no_finite_number_is_refused(tmp_path: Path, value: str, error: type[Exception]) -> None:
    function = function_of(tmp_path, f"def concise(p, r): return {value}")
    with pytest.raises(error, match=r"my_rewards\.py:concise: returned .* for polite-7 \(chosen\), wanted a"):
        function(ASKED, "x", "polite-7 (chosen)")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def concise(p, r:", "raised SyntaxError"),
        ("raise RuntimeError('no\\nmodel')", r"raised RuntimeError \(no model\); mend that file"),
        ("import sys\nsys.exit(3)", "raised SystemExit"),
        ("def short(p, r): return 1\nconcise = 3", "has no function 'concise'; its functions are: short"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        function_of(tmp_path, text)
    assert "\n" not in str(caught.value) and "rewards.length.function" in str(caught.value)


def test_a_missing_file_names_the_places(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"length\.function: got .*none\.py, wanted a Python file; .* not there"
    ):
        load_function(f"{tmp_path / 'none.py'}:concise", "data.own_pairs.rewards.length.function")


def test_the_key_follows_the_content_at_once(tmp_path: Path) -> None:
    first = function_of(tmp_path, "def concise(p, r): return 1.0\ndef kind(p, r): return 1.0")
    kind = load_function(f"{tmp_path / 'my_rewards.py'}:kind", "k")
    same = function_of(tmp_path, "def concise(p, r): return 1.0\ndef kind(p, r): return 1.0")
    changed = function_of(
        tmp_path, "def concise(p, r): return 2.0\ndef kind(p, r): return 1.0"
    )  # as many bytes
    assert first.fingerprint == same.fingerprint and first.call is same.call
    assert len({first.fingerprint, changed.fingerprint, kind.fingerprint}) == 3
    assert changed(ASKED, "x", "x") == 2.0


# ------------------------------------------------------------------ the rewards
def test_a_function_is_asked_once_for_each_text(tmp_path: Path) -> None:
    text = "calls = []\ndef concise(prompt, response):\n    calls.append(response)\n    return len(response)"
    function = function_of(tmp_path, text)
    reward, pairs = brought(tmp_path, function), pairs_of(3)
    found = reward.rewards(reward.rows_of_pairs(pairs), description="pairs")
    assert torch.stack(found).tolist() == [[[1.0], [1.0]], [[2.0], [1.0]], [[3.0], [1.0]]]
    calls = function.call.__globals__["calls"]
    assert sorted(calls) == ["a", "aa", "aaa", "b"]  # "b" is three times the same answer
    rows = reward.rows_of_pairs(pairs)
    assert reward.held(rows) == [True] * 3 and reward.held([reward.rows_of_texts(ASKED, ["c"])]) == [False]
    reward.repeated(5).rewards(rows, description="again")
    assert len(calls) == 4


def test_what_it_said_before_it_failed_is_kept(tmp_path: Path) -> None:
    reward = brought(tmp_path, function_of(tmp_path, "def concise(p, r): return 1 / (150 - len(r))"))
    with pytest.raises(DataError, match=r"raised ZeroDivisionError \(division by zero\) for p149 \(chosen\)"):
        reward.rewards(reward.rows_of_pairs(pairs_of(200)), description="pairs")
    [folder] = (tmp_path / "data" / "cache").iterdir()
    assert len(ScoreTable(folder, 1)) == 128


def test_columns_are_rewards_of_pairs_alone(tmp_path: Path) -> None:
    source = BroughtConfig(column_chosen="good", column_rejected="bad")
    reward = brought(tmp_path, None, source)
    rows = reward.rows_of_pairs(pairs_of(2, length=[0.1, -3.0]))
    assert [r[:, 0].tolist() for r in reward.rewards(rows, description="pairs")] == [[0.1, -3.0]] * 2
    with pytest.raises(DataError, match="columns, which cannot score samples"):
        reward.rewards([reward.rows_of_texts(ASKED, ["x"])], description="samples")
    with pytest.raises(DataError, match=r"the pair p0 \(mine:1\) brings no rewards of it"):
        reward.rows_of_pairs(pairs_of(1, polite=[1.0, 2.0]))
    other = brought(tmp_path, None, BroughtConfig(column_chosen="better", column_rejected="bad"))
    assert other.fingerprint != reward.fingerprint


def test_in_cvar_a_brought_reward_weighs_as_its_objective_does() -> None:
    """Against one enumeration: M = 4 members of weight 0.6 / 4 each beside one atom of weight 0.4."""
    rng = np.random.default_rng(0)
    members, one = rng.normal(size=(4, 6)), rng.normal(size=(1, 6))
    calibration = fit_calibration(torch.tensor(one.T), torch.zeros(6, dtype=torch.long)).repeated(4)
    copies = torch.tensor(one.T).expand(-1, 4)
    calibrated = calibrate(copies, scale=calibration.scale, offset=calibration.offset).T
    rewards = torch.stack([torch.tensor(members), calibrated])
    cvar = Aggregation("none", "cvar", Parameters(alpha=0.3))
    found = robust_rewards(rewards, aggregation=cvar, weights=torch.tensor([0.6, 0.4]))
    unit = (one[0] - one.mean()) / one.std(ddof=1)
    for j in range(6):
        atoms = sorted([(value, 0.15) for value in members[:, j]] + [(unit[j], 0.4)])
        left, total = 0.3, 0.0
        for value, weight in atoms:
            total += min(weight, left) * value
            left -= min(weight, left)
        assert float(found[j]) == pytest.approx(total / 0.3)

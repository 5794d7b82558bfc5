"""What a command in a message repeats of the command that was given."""

import re
import shlex
from pathlib import Path

import pytest

from prmd.artifacts import paths
from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT, remember_options, stage_command, with_options
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import CONFIG_FILES
from prmd.config.policy import PolicyConfig
from prmd.config.repeated import KIND_OF_STAGE, options_of_stages, shell_word
from prmd.config.shared import RewardModelConfig
from utils import config_file_of

OWN_PAIRS = Path("configs/own_pairs")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command is remembered before a test, nor after it."""
    monkeypatch.setattr(paths, "_options", {})


def test_the_scripts_of_a_stage_read_the_kind_that_the_table_says() -> None:
    for script in PROJECT_ROOT.glob("[0-9]_*/*.py"):
        stage = re.search(r'run_stage\(\s*"([\w.:]+)"', script.read_text(encoding="utf-8"))[1]
        assert CONFIG_FILES[config_file_of(stage)] is KIND_OF_STAGE[script.parent.name[0]]


def test_without_options_every_command_stays_as_it_was() -> None:
    text = f"make it with `{stage_command('split_objectives')} --force`"
    assert with_options(text) == text
    for config in (
        CONFIG_DIR,
        CONFIG_DIR / "policy_config.yaml",
        Path("configs"),
    ):  # the default, however named
        remember_options(options_of_stages(config, [], PolicyConfig))
        assert with_options(text) == text


def test_a_command_is_completed_where_it_stands_and_keeps_its_own_arguments() -> None:
    remember_options(options_of_stages(OWN_PAIRS, ["policy.methods=[soup]", "seed=3"], PolicyConfig))
    assert (
        with_options(f"a; run `{stage_command('split_objectives')} --force` first")
        == "a; run `python 1_data_preparation/split_objectives.py --config configs/own_pairs seed=3 --force` first"
    )
    assert with_options("name it, such as `python 2_reward_modeling/train_rm.py objective=polite`").endswith(
        "`python 2_reward_modeling/train_rm.py --config configs/own_pairs seed=3 objective=polite`"
    )
    # what the message sets is not what was given; elsewhere it is
    said = with_options(f'{stage_command("pessimistic_dpo")} "policy.methods=[helpful, honest]"')
    assert said.count("policy.methods") == 1 and said.endswith('seed=3 "policy.methods=[helpful, honest]"')
    said = with_options(f"`{stage_command('pessimistic_dpo')}`, or set policy.methods=[hard_min]")
    assert said.startswith('`python 3_policy_training/pessimistic_dpo.py --config configs/own_pairs "policy.')
    assert with_options("python 2_reward_modeling/train_*_rm.py makes them") == (
        "python 2_reward_modeling/train_*_rm.py --config configs/own_pairs seed=3 makes them"
    )


GIVEN = [
    "data.approach=own_pairs",
    "training.epochs=2",
    "reward_model_config.training.epochs=3",
    "objective=helpful",
    "nonsense",
]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        # Stage 3's own training is no setting of the reward models, and stage 4 has none: there it is that of the file
        # both refer to.
        (
            PolicyConfig,
            {
                "2": ["data.approach=own_pairs", "training.epochs=3"],
                "3": GIVEN[:3],
                "4": ["data.approach=own_pairs", "training.epochs=3"],
            },
        ),
        (
            EvaluationConfig,
            {
                "2": ["data.approach=own_pairs", "training.epochs=2", "training.epochs=3"],
                "3": [
                    "data.approach=own_pairs",
                    "reward_model_config.training.epochs=2",
                    "reward_model_config.training.epochs=3",
                ],
                "4": GIVEN[:3],
            },
        ),
        (
            RewardModelConfig,
            {
                "2": GIVEN[:3],
                "3": [
                    "data.approach=own_pairs",
                    "reward_model_config.training.epochs=2",
                    "reward_model_config.training.epochs=3",
                ],
            },
        ),
        # The pipeline gives every file the keys that it has.
        (None, {"2": GIVEN[:3], "3": GIVEN[:3], "4": GIVEN[:3]}),
    ],
)
def test_an_override_means_the_same_in_the_other_command(
    own: type | None, expected: dict[str, list[str]]
) -> None:
    found = options_of_stages(CONFIG_DIR, GIVEN, own)
    assert {stage: found[stage] for stage in expected} == expected
    assert found["1"] == found["2"]


def test_only_the_command_that_has_a_key_is_given_it() -> None:
    found = options_of_stages(CONFIG_DIR, ["run_name=b", "judges.training.epochs=1"])
    assert found == {"1": [], "2": [], "3": ["run_name=b"], "4": ["judges.training.epochs=1"]}


def test_a_file_is_repeated_to_its_own_kind_and_its_folder_to_the_others() -> None:
    file = OWN_PAIRS / "policy_config.yaml"
    found = options_of_stages(file, [], PolicyConfig)
    assert found["3"] == ["--config", shell_word(str(file))]
    for stage in "124":
        assert found[stage] == ["--config", shell_word(str(OWN_PAIRS))]
    assert {tuple(words) for words in options_of_stages(file, []).values()} == {
        ("--config", shell_word(str(OWN_PAIRS)))
    }


def test_stages_1_and_2_are_sent_to_the_file_that_a_lone_policy_file_refers_to(tmp_path: Path) -> None:
    lone = tmp_path / "my sweep" / "steep.yaml"
    lone.parent.mkdir()
    base = CONFIG_DIR / "policy_config.yaml"
    lone.write_text(f"extends: '{base.as_posix()}'\n", encoding="utf-8")
    found = options_of_stages(lone, [], PolicyConfig)
    assert found["2"] == []  # configs/reward_model_config.yaml, the default
    assert found["3"] == ["--config", f'"{lone}"']
    other = CONFIG_DIR / "hh_small" / "reward_model_config.yaml"
    lone.write_text(f"reward_model_config: '{other.as_posix()}'\n", encoding="utf-8")
    (option, word) = options_of_stages(lone, [], PolicyConfig)["2"]
    assert option == "--config" and Path.cwd() / word.strip('"') == other
    (option, word) = options_of_stages(CONFIG_DIR, [f"reward_model_config={other}"], PolicyConfig)["2"]
    assert option == "--config" and Path.cwd() / word.strip('"') == other


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("configs/own_pairs", "configs/own_pairs"),
        ("my configs/a", '"my configs/a"'),
        ("C:\\work\\configs", '"C:\\work\\configs"'),
        ("policy.methods=[hard_min, cvar]", '"policy.methods=[hard_min, cvar]"'),
        ("a=$HOME", "'a=$HOME'"),
        ('a="b"', "'a=\"b\"'"),
        ("a='b'", "\"a='b'\""),
    ],
)
def test_a_shell_reads_a_word_as_it_was_given(text: str, word: str) -> None:
    assert shell_word(text) == word
    assert shlex.split(word) == [text]


def test_no_key_of_an_address_is_repeated() -> None:
    found = options_of_stages(
        CONFIG_DIR, ["text_judge.base_url=http://h/v1?api-key=SECRET"], EvaluationConfig
    )
    assert found["4"] == ['"text_judge.base_url=http://h/v1?api-key=***"']

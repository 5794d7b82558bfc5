"""Objectives from the configuration: what follows them, what a mapping on the command line replaces, and what is refused."""

from pathlib import Path

import pytest

from prmd.artifacts.paths import CONFIG_DIR, reward_model_command
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import as_dict, load_config, load_pipeline, named_arguments
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError
from prmd.policies.methods import method_of, soup_members
from prmd.report.figures import OBJECTIVE_COLOURS, PALETTE, objective_colour
from prmd.rewards.train import train_reward_model
from run_pipeline import stages

OWN = "data.own_pairs.objectives={concise: {path: a.jsonl}, polite: {path: b.csv, columns: {chosen: win}}}"
APPROACH = "data.approach=own_pairs"


def policy(*overrides: str, folder: Path = CONFIG_DIR) -> PolicyConfig:
    return load_config(folder, PolicyConfig, [APPROACH, OWN, *overrides])


def test_the_keys_are_the_objectives_in_their_order() -> None:
    configs = load_pipeline(CONFIG_DIR, [APPROACH, OWN])
    assert {config.paths.objectives for config in configs.values()} == {("concise", "polite")}
    names = [name for name, _, _ in stages(configs[RewardModelConfig].paths.objectives)]
    assert names[2:5] == ["train_concise_rm", "train_polite_rm", "baseline_dpo"]
    assert reward_model_command("polite") == "python 2_reward_modeling/train_rm.py objective=polite"
    assert configs[PolicyConfig].paths.reward_model_commands.endswith(
        "train_rm.py objective=<concise | polite>"
    )
    assert load_config(CONFIG_DIR, RewardModelConfig).paths.reward_model_commands.endswith("train_*_rm.py")
    assert soup_members(("concise", "polite")) == ("dpo_concise", "dpo_polite")
    assert method_of("dpo_polite").objective == "polite" and method_of("dpo_polite").loss == "dpo"


def test_weights_are_equal_unless_given_and_in_the_order_of_the_objectives() -> None:
    assert policy().policy.weights == {"concise": 0.5, "polite": 0.5}
    given = policy("policy.weights={polite: 0.9, concise: 0.1}").policy.weights
    assert list(given.items()) == [("concise", 0.1), ("polite", 0.9)]
    one_by_one = policy("policy.weights.concise=0.25", "policy.weights.polite=0.75").policy.weights
    assert one_by_one == {"concise": 0.25, "polite": 0.75}
    ours = load_config(CONFIG_DIR, PolicyConfig, ["policy.weights={helpful: 0, harmless: 0.5, honest: 0.5}"])
    assert list(ours.policy.weights.values()) == [0.0, 0.5, 0.5]


def test_a_mapping_on_the_command_line_replaces_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "reward_model_config.yaml").write_text(
        "data:\n  approach: own_pairs\n  splits: {val_fraction: 0.2}\n"
        "  own_pairs: {objectives: {old: {path: o}, older: {path: p}}}\n",
        encoding="utf-8",
    )
    (tmp_path / "policy_config.yaml").write_text(
        "reward_model_config: reward_model_config.yaml\npolicy: {weights: {old: 0.7, older: 0.3}, constraints: {old: 1.0}}\n",
        encoding="utf-8",
    )
    kept = load_config(tmp_path, PolicyConfig)
    assert kept.policy.weights == {"old": 0.7, "older": 0.3}
    equal = ["policy.weights={}", "policy.constraints={polite: 0.5}"]
    changed = policy(*equal, folder=tmp_path)
    assert changed.paths.objectives == ("concise", "polite") and changed.policy.constraints == {"polite": 0.5}
    assert changed.policy.weights == {"concise": 0.5, "polite": 0.5}
    # one key is still one key, and a section is completed and not replaced
    path = load_config(tmp_path, RewardModelConfig, ["data.own_pairs.objectives.old.path=q"])
    assert {k: f.path for k, f in path.data.own_pairs.objectives.items()} == {"old": "q", "older": "p"}
    section = load_config(tmp_path, RewardModelConfig, ["data.splits={test_fraction: 0.3}"])
    assert (section.data.splits.val_fraction, section.data.splits.test_fraction) == (0.2, 0.3)


def test_the_built_in_approaches_dump_what_they_always_did() -> None:
    assert "own_pairs" not in as_dict(RewardModelConfig())["data"]
    dumped = as_dict(load_config(CONFIG_DIR, RewardModelConfig, [APPROACH, OWN]))
    assert list(dumped["data"]["own_pairs"]["objectives"]) == ["concise", "polite"]
    assert RewardModelConfig.model_validate(dumped).paths.objectives == ("concise", "polite")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.own_pairs.objectives={}"], "data.own_pairs.objectives: got none, wanted the file of each|got none, wanted"),
        (["data.own_pairs.objectives={concise: {path: a}}"], "got one objective, concise, wanted two or more: with one"),
        (["data.own_pairs.objectives={a: {path: a}, 'b/c': {path: b}}"], "got the name 'b/c', wanted letters"),
        (["data.own_pairs.objectives={a: {path: a}, A: {path: b}}"], "two differ in case alone"),
        (["data.own_pairs.objectives={a: {path: a}, con: {path: b}}"], "got the name 'con'"),
        (["data.own_pairs.objectives={a: {path: a}, b: {}}"], "objectives.b.*path|Field required"),
        (["data.own_pairs.objectives={a: {path: a}, b: {path: b, colums: {}}}"], "unknown key.*columns"),
        (["data.own_pairs.objectives={a: {path: a}, b: {path: b, columns: {win: c}}}"], "columns name ..win.*known are prompt"),
        (["policy.weights={concise: 0.5, helpful: 0.5}"], "weights must name each of concise, polite once; unknown ..helpful"),
        (["policy.constraints={honest: 0.5}"], "constraints name ..honest.*known objectives are concise, polite"),
        (["policy.methods=[dpo_helpful]"], "methods name ..helpful.*known objectives are concise, polite"),
        (["policy.methods=[hard_mn]"], "did you mean hard_min"),
        (["policy.methods=[baseline_dpo]"], r"got baseline_dpo, which 3_policy_training/baseline_dpo\.py trains in any case"),
        (["data.own_pairs.scored={path: s}"], "got none, wanted a column for each objective"),
        (["data.own_pairs.scored={path: s, scores: {polite: p}}"], "got polite, which has a file of its own"),
        (["data.own_pairs.scored={path: s, preset: ultrafeedback, scores: {x: style}}"], "UltraFeedback rates helpfulness"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_each_with_their_place(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        policy(*overrides)
    assert len(str(refused.value).splitlines()) == 1 and overrides[0].split("=")[0] in str(refused.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.own_pairs.objectives={a: {path: a}, b: {path: 3}}", ": data.own_pairs.objectives.b.path: got 3, wanted"),
        ("data.own_pairs.objectives={a: {path: a}, b: x.csv}", ': data.own_pairs.objectives.b: got "x.csv", wanted'),
        ("policy.weights={concise: half, polite: 0.5}", ': policy.weights.concise: got "half", wanted a valid number'),
        ("policy.weights.concise=half", 'concise=half: got "half", wanted a valid number'),
        ("reward_model_config.model.name=3", "reward_model_config.model.name=3: got 3, wanted a valid string"),
    ],
)  # fmt: skip
def test_a_value_inside_a_mapping_on_the_command_line_has_its_key(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        policy(override)
    assert str(refused.value).startswith(f"command line: {override}: ") and said in str(refused.value)


def test_a_judge_of_no_objective_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"judges.paths names ..helpful.*known objectives are concise, polite"
    ):
        load_config(CONFIG_DIR, EvaluationConfig, [APPROACH, OWN, "judges.paths={helpful: x}"])


def test_one_reward_model_is_named_on_the_command_line() -> None:
    given, rest = named_arguments(["objective=polite", "seed=1"], {"objective": None})
    assert (given, rest) == ({"objective": "polite"}, ["seed=1"])
    assert named_arguments(["objective=polite"], {"objective": "helpful"}) == (
        {"objective": "helpful"},
        ["objective=polite"],
    )
    config = load_config(CONFIG_DIR, RewardModelConfig, [APPROACH, OWN])
    for wrong in (None, "helpful"):
        with pytest.raises(
            ConfigError, match=r"wanted one of concise, polite.*train_rm.py objective=concise"
        ):
            train_reward_model(config, objective=wrong, dry_run=True)
    folder = train_reward_model(config, objective="polite", dry_run=True)
    assert folder == config.paths.reward_model("polite")


def test_twelve_objectives_have_twelve_colours_and_ours_keep_theirs() -> None:
    own = [f"o{i}" for i in range(13)]
    assert [objective_colour(k, own) for k in own[:12]] == list(OBJECTIVE_COLOURS)
    assert len(set(OBJECTIVE_COLOURS)) == 12
    assert objective_colour("honest") == objective_colour("honest", ["honest"]) == PALETTE[2]
    assert objective_colour(own[12], own) not in OBJECTIVE_COLOURS


# ------------------------------------------------------------------ rewards that are brought
FUNCTION = "data.own_pairs.rewards={polite: {function: my_rewards.py:polite}}"
COLUMNS = "data.own_pairs.rewards={polite: {column_chosen: a, column_rejected: b}}"
ALLOWED = "data.own_pairs.allow_code=true"
ON_PAIRS = "calibration.source=validation_responses"


def test_rewards_of_ones_own_are_of_the_objectives() -> None:
    data = policy(FUNCTION, ALLOWED).shared.data
    assert list(data.brought) == ["polite"] and data.from_columns == ()
    assert policy(COLUMNS, ON_PAIRS).shared.data.from_columns == ("polite",)
    kept = as_dict(policy(COLUMNS, ON_PAIRS))["reward_model_config"]["data"]["own_pairs"]
    assert kept["rewards"]["polite"]["column_chosen"] == "a" and "allow_code" not in kept
    assert not {"rewards", "allow_code"} & set(
        as_dict(policy())["reward_model_config"]["data"]["own_pairs"]
    )  # so that what was finished without them stays finished


def test_code_that_may_not_run_is_refused_and_not_imported(tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    (tmp_path / "my_rewards.py").write_text(
        f"open({str(marker)!r}, 'w').close()\ndef polite(p, r): return 1.0\n", encoding="utf-8"
    )
    named = (
        f"data.own_pairs.rewards={{polite: {{function: '{(tmp_path / 'my_rewards.py').as_posix()}:polite'}}}}"
    )
    for refused in ((), ("data.own_pairs.allow_code=false",)):
        with pytest.raises(ConfigError, match=r"read it, and set data\.own_pairs\.allow_code: true"):
            policy(named, *refused)
    policy(named, ALLOWED)
    assert not marker.exists()  # a configuration runs nothing


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.own_pairs.rewards={kind: {function: a.py:f}}", ALLOWED], r"rewards name \['kind'\]; known"),
        (
            ["data.own_pairs.rewards={polite: {function: a.py}}", ALLOWED],
            "wanted a Python file and a function in it",
        ),
        (["data.own_pairs.rewards={polite: {column_chosen: a}}"], "wanted one source of rewards"),
        (["data.own_pairs.rewards={polite: {}}"], "wanted one source of rewards"),
        (
            ["data.own_pairs.rewards={polite: {function: a.py:f, column_rejected: b}}", ALLOWED],
            "wanted one source of rewards",
        ),
        ([COLUMNS], r"calibration\.source: got reference_samples, and the rewards of polite are columns"),
        (
            [COLUMNS, ON_PAIRS, "policy.methods=[maxmin]"],
            r"policy\.methods: maxmin needs scored samples, and the",
        ),
        (
            [COLUMNS, ON_PAIRS, "policy.constraints={concise: 1.0}"],
            r"policy\.constraints: needs scored samples",
        ),
        ([COLUMNS, ON_PAIRS, "policy.gamma=0.1"], r"policy\.gamma: needs scored samples"),
        (
            [COLUMNS, ON_PAIRS, "pairs.reference_samples=4"],
            r"reference_samples=4: got 4, and the rewards of polite",
        ),
        (
            [FUNCTION, ALLOWED, "debias.features={polite: [length]}"],
            r"debias\.features names \['polite'\], whose",
        ),
        (
            [COLUMNS, ON_PAIRS, "data.own_pairs.scored={path: a, scores: {rated: r}}"],
            "also those of data.own_pairs.scored, which have no such columns",
        ),
    ],
)
def test_rewards_that_cannot_be_had_are_refused_when_the_file_is_read(
    overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        policy(*overrides)
    assert str(caught.value).count("\n") == 0


def test_what_needs_samples_takes_a_function() -> None:
    needs = ("policy.methods=[maxmin]", "policy.constraints={concise: 1.0}", "pairs.reference_samples=4")
    assert policy(FUNCTION, ALLOWED, *needs).pairs.reference_samples == 4


def test_a_mistyped_name_of_an_argument_is_not_taken_for_a_key_of_the_file() -> None:
    for text in ("objektive=helpful", "objectives=helpful"):
        with pytest.raises(ConfigError) as refused:
            named_arguments(["seed=1", text], {"objective": None})
        said = f"command line: {text}: got an unknown key; did you mean objective?"
        assert str(refused.value) == said
        assert named_arguments([text], {"objective": "helpful"})[1] == [text]  # a script that names its own
    assert named_arguments(["sed=1"], {"objective": None})[1] == ["sed=1"]  # for the file's own advice

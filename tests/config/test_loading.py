"""Reading configuration files: values, references, overrides, and every mistake with its place."""

from pathlib import Path

import pytest
import yaml

from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT
from prmd.artifacts.runs import dump_yaml
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import as_dict, kept_model, load_config, load_pipeline
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Minimal files of all three kinds, in the current folder, so that messages show bare file names."""
    write(tmp_path / "reward_model_config.yaml", "seed: 7\ndata:\n  approach: embedded\n")
    write(tmp_path / "policy_config.yaml", "reward_model_config: reward_model_config.yaml\n")
    write(tmp_path / "evaluation_config.yaml", "reward_model_config: reward_model_config.yaml\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def mistakes(*arguments, load=load_config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    return str(caught.value).splitlines()


# ------------------------------------------------------------------ values
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1E-5", 1e-5),
        ("1.5e-4", 1.5e-4),
        ("2e+1", 20.0),
        (".5", 0.5),
        ("3", 3.0),
        ("1.", 1.0),
    ],
)
def test_numbers_load_as_floats(folder: Path, text: str, value: float) -> None:
    path = write(folder / "reward_model_config.yaml", f"training:\n  learning_rate: {text}\n")
    loaded = load_config(path, RewardModelConfig).training.learning_rate
    assert isinstance(loaded, float) and loaded == value


def test_dates_and_byte_order_mark_are_harmless(folder: Path) -> None:
    path = folder / "reward_model_config.yaml"
    path.write_text("model:\n  revision: 2024-01-01\n", encoding="utf-8-sig")
    assert load_config(path, RewardModelConfig).model.revision == "2024-01-01"


def test_empty_file_is_all_defaults(folder: Path) -> None:
    assert load_config(write(folder / "x.yaml", "# nothing\n"), RewardModelConfig) == RewardModelConfig()


def test_folder_stands_for_the_file_of_its_kind(folder: Path) -> None:
    assert load_config(folder, RewardModelConfig).seed == 7
    assert load_config(folder, PolicyConfig) == load_config(folder / "policy_config.yaml", PolicyConfig)


def test_reference_follows_the_named_file(folder: Path) -> None:
    config = load_config(folder, EvaluationConfig)
    assert config.shared.data.approach == "embedded" and config.shared.seed == 7
    assert config.paths.approach == "embedded"


def test_reference_is_relative_to_the_file_that_says_it(folder: Path) -> None:
    write(folder / "sub" / "policy_config.yaml", "extends: ../policy_config.yaml\npolicy:\n  beta: 0.2\n")
    write(folder / "sub" / "reward_model_config.yaml", "seed: 8\n")
    config = load_config(folder / "sub", PolicyConfig)
    assert config.shared.seed == 7  # the reference stands in ../policy_config.yaml
    write(
        folder / "sub" / "policy_config.yaml",
        "extends: ../policy_config.yaml\nreward_model_config: reward_model_config.yaml\n",
    )
    assert load_config(folder / "sub", PolicyConfig).shared.seed == 8


def test_extends_merges_deeply_and_replaces_lists(folder: Path) -> None:
    write(folder / "base.yaml", "training:\n  epochs: 2.0\n  checkpoints: [0.5, 1.0]\n  max_length: 64\n")
    write(
        folder / "sub" / "child.yaml",
        "extends: ../base.yaml\ntraining:\n  epochs: 4.0\n  checkpoints: [1.0]\n",
    )
    training = load_config(folder / "sub" / "child.yaml", RewardModelConfig).training
    assert (training.epochs, training.checkpoints, training.max_length) == (4.0, (1.0,), 64)


def test_as_dict_and_dump_yaml_round_trip(folder: Path) -> None:
    config = load_config(folder, PolicyConfig, ["policy.beta=0.3", "training.learning_rate=5e-7"])
    path = write(folder / "copy" / "config.yaml", dump_yaml(config))
    assert load_config(path, PolicyConfig) == config
    assert list(as_dict(config)) == list(PolicyConfig.model_fields)
    assert as_dict(config)["training"]["checkpoints"] == [0.33, 0.66, 1.0]
    assert yaml.safe_load(dump_yaml(config)) == as_dict(config)


# ------------------------------------------------------------------ overrides
def test_overrides_reach_the_file_whose_schema_has_them(folder: Path) -> None:
    overrides = ["data.approach=pku_safe", "policy.methods=[mean, lcb]", "training.epochs=2", "run_name=x"]
    config = load_config(folder, PolicyConfig, overrides)
    assert config.shared.data.approach == "pku_safe"
    assert config.policy.methods == ("mean", "lcb")
    assert config.training.epochs == 2.0 and config.shared.training.epochs == 3.0  # own file first
    assert config.run_name == "x"


def test_override_can_name_the_shared_file_and_its_keys(folder: Path) -> None:
    write(folder / "other.yaml", "seed: 9\n")
    config = load_config(
        folder, PolicyConfig, ["reward_model_config.training.epochs=5", "reward_model_config=other.yaml"]
    )
    assert (config.shared.seed, config.shared.training.epochs, config.training.epochs) == (9, 5.0, 1.0)
    assert (
        load_config(folder, RewardModelConfig, ["reward_model_config.training.epochs=5"]).training.epochs
        == 5.0
    )


def test_later_override_wins_and_null_and_text_are_read_as_yaml(folder: Path) -> None:
    config = load_config(
        folder, PolicyConfig, ["seed=1", "seed=2", "training.max_pairs=null", r"artifact_root=C:\data"]
    )
    assert config.shared.seed == 2 and config.training.max_pairs is None
    assert config.shared.artifact_root == r"C:\data"


def test_pipeline_gives_each_override_to_every_file_that_has_its_key(folder: Path) -> None:
    configs = load_pipeline(folder, ["data.approach=pku_safe", "policy.beta=0.2", "generation.prompts=3"])
    assert {config.paths.approach for config in configs.values()} == {"pku_safe"}
    assert configs[PolicyConfig].policy.beta == 0.2 and configs[EvaluationConfig].generation.prompts == 3


def test_a_section_given_in_part_keeps_the_defaults_of_its_own_file(folder: Path) -> None:
    policy = load_config(folder, PolicyConfig, ["training.max_length=64", "tuning.lora.r=8"])
    assert policy.training == PolicyConfig().training.model_copy(update={"max_length": 64})
    assert policy.tuning.lora.learning_rate == PolicyConfig().tuning.lora.learning_rate
    judges = load_config(folder, EvaluationConfig, ["judges.training.max_length=64"]).judges
    assert judges.training.epochs == 1.0 and judges.tuning.method == "lora"


# ------------------------------------------------------------------ mistakes
def test_the_accumulation_follows_from_the_pairs_of_a_step_unless_it_is_given(folder: Path) -> None:
    text = (
        "reward_model_config: reward_model_config.yaml\ntraining: {pairs_per_step: 24, pairs_per_device: 5}\n"
    )
    write(folder / "policy_config.yaml", text)
    config = load_config(folder, PolicyConfig)
    assert (config.training.pairs_per_step, config.training.gradient_accumulation_steps) == (24, 5)
    given = load_config(folder, PolicyConfig, ["training.gradient_accumulation_steps=3"])
    assert given.training.gradient_accumulation_steps == 3  # refused where a training begins


def test_all_mistakes_of_all_files_at_once_with_their_lines(folder: Path) -> None:
    write(
        folder / "base.yaml",
        "# base\nreward_model_config: reward_model_config.yaml\npolicy:\n  bta: 0.1\n  loss: squard\n",
    )
    write(folder / "reward_model_config.yaml", "seed: 7\n\ntraining:\n  epochs: many\n")
    path = write(folder / "policy_config.yaml", "extends: base.yaml\ntraining:\n  max_length: 1.5\n")
    lines = mistakes(path, PolicyConfig, ["policy.alpha=2", "learning_rat=1", "oops"])
    assert len(lines) == 7
    text = "\n".join(lines)
    assert 'reward_model_config.yaml:4: training.epochs: got "many", wanted a valid number' in text
    assert "base.yaml:4: policy.bta: got an unknown key" in text and "did you mean policy.beta?" in text
    assert 'base.yaml:5: policy.loss: got "squard"' in text and "did you mean squared?" in text
    assert "policy_config.yaml:3: training.max_length: got 1.5, wanted a valid integer" in text
    assert "command line: policy.alpha=2: got 2, wanted less than or equal to 1" in text
    assert "command line: learning_rat=1: got an unknown key; did you mean" in text
    assert "training.learning_rate" in text
    assert "command line: oops: got 'oops', wanted key.sub=value" in text


def test_unknown_key_without_a_near_one_lists_the_known(folder: Path) -> None:
    (line,) = mistakes(folder, RewardModelConfig, ["training.zzz=1"])
    assert "wanted one of learning_rate, pairs_per_device" in line and "did you mean" not in line


@pytest.mark.parametrize("name", ["../x", "a b", "a/b", "ü", "a..b"])
def test_a_run_name_that_can_end_no_folder_name_is_refused_before_anything_runs(
    folder: Path, name: str
) -> None:
    (line,) = mistakes(folder, PolicyConfig, [f"run_name={name}"])
    assert f"got {name!r}, wanted letters, digits and" in line
    assert load_config(folder, PolicyConfig, ["run_name=beta=0.2"]).run_name == "beta=0.2"


def test_key_in_the_wrong_section_is_found(folder: Path) -> None:
    path = write(folder / "reward_model_config.yaml", "members: 3\n")
    (line,) = mistakes(path, RewardModelConfig)
    assert (
        line.startswith("reward_model_config.yaml:1: members:") and "did you mean ensemble.members?" in line
    )


@pytest.mark.parametrize(
    ("text", "got", "wanted"),
    [
        ("seed: true", "got true", "integer"),
        ("seed: '4'", 'got "4"', "integer"),
        ("seed: -1", "got -1", "greater than or equal to 0"),
        ("seed:", "got null", "integer"),
        ("seed: [1]", "got [1]", "integer"),
        ("data: here", 'got "here"', "section"),
        ("model:\n  name: 3", "got 3", "string"),
        ("model:\n  trust_remote_code: 'no'", 'got "no"', "boolean"),
        ("report_to: tensorboard", 'got "tensorboard"', "array"),
        ("training:\n  gradient_checkpointing: maybe", 'got "maybe"', "'auto' or a valid boolean"),
        ("training:\n  learning_rate: .inf", 'got ".inf"', "number"),
        ("training:\n  learning_rate: .nan", 'got ".nan"', "number"),
        ("training:\n  learning_rate: 1e999", 'got "1e999"', "number"),
        ("training:\n  checkpoints: [0.5]", "checkpoints [0.5]", "end at 1.0"),
        ("data:\n  splits: {val_fraction: 0.6, test_fraction: 0.6}", "sum to 1.3", "some pairs to train on"),
    ],
)
def test_wrong_values_say_what_they_got_and_what_is_wanted(
    folder: Path, text: str, got: str, wanted: str
) -> None:
    (line,) = mistakes(write(folder / "reward_model_config.yaml", text + "\n"), RewardModelConfig)
    assert line.startswith("reward_model_config.yaml:") and got in line and wanted in line


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("seed: 1\nseed: 2\n", 2, "seed: given twice, first at reward_model_config.yaml:1"),
        ("a: &x 1\nb: *x\n", 2, "alias"),
        ("seed: [1\nmodel: 2\n", 2, "not readable as YAML"),
        ("seed: 1\n\tmodel: 2\n", 2, "not readable as YAML"),
        ("seed: !!python/name:os.system 1\n", 1, "not readable as YAML"),
        ("- 1\n", 1, "wanted `key: value` lines"),
        ("1: 2\n", 1, "wanted text"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_with_its_line(
    folder: Path, text: str, line: int, problem: str
) -> None:
    lines = mistakes(write(folder / "reward_model_config.yaml", text), RewardModelConfig)
    assert any(m.startswith(f"reward_model_config.yaml:{line}: ") and problem in m for m in lines), lines


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.own_pairs.objectives={a: {path: x.csv}, a: {path: y.csv}}", "data.own_pairs.objectives: a"),
        ("data.splits={val_fraction: 2, val_fraction: 0.1}", "data.splits: val_fraction"),
    ],
)
def test_a_key_that_an_override_gives_twice_is_one_short_line(folder: Path, override: str, said: str) -> None:
    own = [] if "splits" in override else ["data.approach=own_pairs"]
    (line,) = mistakes(folder, RewardModelConfig, [*own, override])
    assert line == f"command line: {said}: given twice; keep one of them"


@pytest.mark.parametrize(
    ("override", "got", "form"),
    [
        ("data.own_pairs.objectives={a: {path: y.csv}, b: x.csv}", '"x.csv"', "{path: x.csv}"),
        ("data.own_pairs.objectives={a: {path: y.csv}, b: 'x y.csv'}", '"x y.csv"', '{path: "x y.csv"}'),
        ("data.own_pairs.objectives={a: {path: y.csv}, b: {}}", "{}", "{path: ...}"),
        ("data.own_pairs.objectives=x.csv", '"x.csv"', "{NAME: {path: ...}, ...}"),
        ("data.own_pairs.scored=x.csv", '"x.csv"', "{path: x.csv}"),
        ("policy.weights=[1,2,3]", "[1, 2, 3]", "{NAME: 0.5, ...}"),
        ("debias.features=length", '"length"', "{NAME: [...], ...}"),
        (
            "data.own_pairs.rewards={a: f.py:x}",
            '"f.py:x"',
            "{function: ..., column_chosen: ..., column_rejected: ...}",
        ),
        ("model=org/name", '"org/name"', "{source: ..., name: ..., revision: ..., ...}"),
        ("data.splits=null", "null", "{val_fraction: ..., test_fraction: ..., judge_fraction: ..., ...}"),
    ],
)
def test_what_should_be_a_section_is_shown_as_one(folder: Path, override: str, got: str, form: str) -> None:
    (line,) = mistakes(folder, PolicyConfig, [override])
    assert line.startswith(f"command line: {override}: ")
    assert line.endswith(f"got {got}, wanted a section, such as {form}")


def test_a_mistake_in_one_override_hides_none_of_another(folder: Path) -> None:
    lines = mistakes(folder, RewardModelConfig, ["data.splits={val_fraction: 1, val_fraction: 2}", "seed=x"])
    assert lines == [
        "command line: data.splits: val_fraction: given twice; keep one of them",
        'command line: seed=x: got "x", wanted a valid integer',
    ]


def test_circles_and_missing_files_name_who_asked(folder: Path) -> None:
    write(folder / "a.yaml", "extends: b.yaml\n")
    write(folder / "b.yaml", "seed: 1\nextends: a.yaml\n")
    (line,) = mistakes(folder / "a.yaml", RewardModelConfig)
    assert line.startswith("b.yaml:2: extends: extends goes in a circle: a.yaml -> b.yaml -> a.yaml")
    write(folder / "policy_config.yaml", "reward_model_config: gone.yaml\n")
    (line,) = mistakes(folder, PolicyConfig)
    assert line.startswith("policy_config.yaml:1: reward_model_config: got gone.yaml")
    (line,) = mistakes(Path("nowhere.yaml"), RewardModelConfig)
    assert line.startswith("--config: got nowhere.yaml, wanted a YAML file or the folder that holds it; ")
    for place in (folder, PROJECT_ROOT):
        assert f"{place / 'nowhere.yaml'} is not there" in line
    lines = mistakes(Path("nowhere.yaml"), RewardModelConfig, ["sed=1"])
    assert lines[0].startswith("command line: sed=1: got an unknown key") and lines[1] == line


def test_missing_reference_and_wrong_kind_of_file(folder: Path) -> None:
    write(folder / "policy_config.yaml", "policy:\n  beta: 0.1\n")
    (line,) = mistakes(folder, PolicyConfig)
    assert line.startswith("policy_config.yaml: reward_model_config: got nothing")
    (line,) = mistakes(folder / "reward_model_config.yaml", PolicyConfig)
    assert "wanted policy_config.yaml" in line


def test_override_of_another_file_and_of_no_file(folder: Path) -> None:
    (line,) = mistakes(folder, RewardModelConfig, ["policy.beta=1"])
    assert line == (
        "command line: policy.beta=1: policy is set in policy_config.yaml, which this command does not read; "
        "leave it out here"
    )
    (line,) = mistakes(folder, ["approach=pku_safe"], load=load_pipeline)
    assert "did you mean data.approach?" in line


def test_pipeline_says_a_mistake_of_the_shared_file_once(folder: Path) -> None:
    write(folder / "reward_model_config.yaml", "sed: 7\n")
    (line,) = mistakes(folder, load=load_pipeline)
    assert line.startswith("reward_model_config.yaml:1: sed:") and "did you mean seed?" in line


def test_pipeline_refuses_a_mistyped_folder(folder: Path) -> None:
    (line,) = mistakes(folder / "quikstart", load=load_pipeline)
    assert "wanted a folder that holds reward_model_config.yaml" in line


def test_a_file_that_is_not_utf8(folder: Path) -> None:
    (folder / "reward_model_config.yaml").write_bytes(b"artifact_root: \xff\n")
    assert mistakes(folder, RewardModelConfig) == [
        "reward_model_config.yaml: not UTF-8; save the file as UTF-8"
    ]


@pytest.mark.parametrize(
    "content",
    [b"model: [", b"- 1", b"model: 3", b"\xff", b"model: {name: [3]}", b"a: \x00", b"model: {name: \n"],
)
def test_a_damaged_configuration_beside_an_artifact_is_one_line(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.yaml: damaged \(.*--force$") as caught:
        kept_model(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["policy.methods=hard_min"],
            'wanted a valid array, which has brackets: write "policy.methods=[hard_min]"',
        ),
        (["policy.methods=hard_min,cvar"], 'write "policy.methods=[hard_min, cvar]"'),
        (["policy.methods=hard_min cvar"], 'write "policy.methods=[hard_min, cvar]"'),
        (["training.checkpoints=1.0"], 'write "training.checkpoints=[1.0]"'),
        (
            ["policy.methods=[hard_min,", "cvar]"],
            'in 2 parts; put it in quotes: "policy.methods=[hard_min, cvar]"',
        ),
        (
            ["policy.beta=0.1", "policy.weights={helpful:", "1.0}"],
            'in 2 parts; put it in quotes: "policy.weights={helpful: 1.0}"',
        ),
    ],
)
def test_a_list_as_a_shell_or_a_habit_leaves_it_is_one_line_with_the_way_to_write_it(
    overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(CONFIG_DIR, PolicyConfig, overrides)
    assert said in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_list_without_brackets_in_a_file_is_shown_with_them(tmp_path: Path) -> None:
    path = tmp_path / "policy_config.yaml"
    shared = (CONFIG_DIR / "reward_model_config.yaml").as_posix()
    path.write_text(f"reward_model_config: {shared}\npolicy:\n  methods: hard_min\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"policy_config\.yaml:3: policy\.methods: .* write methods: \[hard_min\]"
    ):
        load_config(path, PolicyConfig)

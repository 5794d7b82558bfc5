"""One relative path means the same to every key that takes one: the working folder's, else the project's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from prmd.artifacts import paths
from prmd.benchmarks.base import NotRunError, content_key
from prmd.benchmarks.jailbreakbench import jailbreak_rubric
from prmd.benchmarks.jailbreakbench_data import Behavior, read_attacks
from prmd.benchmarks.mt_bench import run_mt_bench
from prmd.benchmarks.truthfulqa import Question
from prmd.benchmarks.truthfulqa_generation import _human_labels
from prmd.config.evaluation import EvaluationConfig, JailbreakBenchConfig, MtBenchConfig
from prmd.config.loading import load_config, load_pipeline
from prmd.config.policy import PolicyConfig
from prmd.config.shared import DataConfig, ModelConfig, RewardModelConfig
from prmd.data.prepare import download_dataset
from prmd.data.readers import benchmark_files
from prmd.data.sources import plan_source
from prmd.errors import ConfigError
from prmd.judges.classifier import LabelClassifier
from prmd.judges.reward_model import judge_folder
from prmd.judges.text import ReplayJudge, make_text_judge
from prmd.models.foreign import model_folder
from prmd.models.loading import base_model_key, load_tokenizer, model_source

NAME = "my/own/files"  # three parts: no hub id, so that nothing asks the hub


# ------------------------------------------------------------------ what each key reads
def fill(folder: Path) -> Path:
    """A folder in which every file says where it is."""
    said = folder.as_posix()
    rows = {
        "pairs.jsonl": {"prompt": said, "response_0": "a", "response_1": "b"},
        "verdicts.jsonl": {"id": "a", "label": said},
        "attacks.jsonl": {"index": 0, "prompt": said},
        "finetune_truth.jsonl": {"prompt": f"Q: Why?\nA: {said}\nTrue:", "completion": " yes"},
    }
    folder.mkdir(parents=True)
    for name, row in rows.items():
        (folder / name).write_text(json.dumps(row), encoding="utf-8")
    (folder / "words.txt").write_text(f"{said} {{request}} {{response}}", encoding="utf-8")
    (folder / "reward_model_config.yaml").write_text(f"artifact_root: {said}\n", encoding="utf-8")
    for name in ("policy_config.yaml", "evaluation_config.yaml"):
        (folder / name).write_text("reward_model_config: reward_model_config.yaml\n", encoding="utf-8")
    return folder


def evaluation(**values: object) -> EvaluationConfig:
    return EvaluationConfig.model_validate(values)


def preference_data(text: str) -> str:
    data = DataConfig.model_validate({"pku_safe_rlhf": {"path": f"{text}/pairs.jsonl"}})
    return next(iter(plan_source("pku_safe_rlhf", data)[0].read()))["prompt"]


def benchmark_data(text: str) -> str:
    (file,) = benchmark_files(text, ("attacks.jsonl",), "benchmarks.realtoxicityprompts.path") or []
    return file.parent.as_posix()


def mt_bench_folder(text: str) -> str:
    config = evaluation(benchmarks={"mt_bench": {"path": text}})
    try:
        run_mt_bench(config, None)  # type: ignore[arg-type]  # no policy before its files
    except NotRunError as error:
        reason = str(error)
    if not reason.endswith("question.jsonl"):
        raise ConfigError(reason)
    return Path(reason.removeprefix("data missing at ")).parent.as_posix()


def attack_file(text: str) -> str:
    settings = JailbreakBenchConfig(attacks=f"{text}/attacks.jsonl")
    (attack,) = read_attacks(settings, {"harmful": [Behavior(0, "goal", "category")]}) or []
    return attack.prompt or ""


def replayed_verdicts(text: str) -> str:
    judge = make_text_judge(evaluation(text_judge={"kind": "replay", "file": f"{text}/verdicts.jsonl"}))
    assert isinstance(judge, ReplayJudge)
    return judge.chat.rows["a"]


def human_labels(text: str) -> str:
    shared = {"data": {"truthfulqa": {"path": f"{text}/pairs.jsonl"}}}
    questions = [Question("Why?", "So.", ("So.",), ("No.",))]
    found = _human_labels(questions, evaluation(reward_model_config=shared).shared.data.truthfulqa.path)
    return found[0][1] if found else NAME


def base_model(text: str) -> str:
    config = RewardModelConfig()
    return Path(model_source(ModelConfig(name=text, revision=None), config.paths)).as_posix()


REFUSED_WHERE_MISSING: dict[str, Callable[[str], str]] = {
    "data.pku_safe_rlhf.path": preference_data,
    "benchmarks.realtoxicityprompts.path": benchmark_data,
    "benchmarks.mt_bench.path": mt_bench_folder,
    "benchmarks.jailbreakbench.attacks": attack_file,
    "benchmarks.jailbreakbench.judge_prompt": lambda text: jailbreak_rubric(
        f"{text}/words.txt"
    ).template.split(" {")[0],
    "text_judge.file": replayed_verdicts,
    "generation.policies.theirs": lambda text: model_folder(text, "generation.policies.theirs", "")[
        0
    ].as_posix(),
    "judges.paths.helpful": lambda text: judge_folder(text, "helpful").as_posix(),
    "--config": lambda text: load_config(Path(text), RewardModelConfig).artifact_root,
    "--config of the pipeline": lambda text: (
        load_pipeline(Path(text))[PolicyConfig].shared.artifact_root  # type: ignore[union-attr]
    ),
    "command line: reward_model_config": lambda text: (
        load_config(
            Path("one/policy_config.yaml"),
            PolicyConfig,
            [f"reward_model_config={text}/reward_model_config.yaml"],
        ).shared.artifact_root
    ),
}
READ_ELSEWHERE: dict[str, Callable[[str], str]] = {
    "model.name": base_model,
    "text_judge.model": lambda text: Path(
        LabelClassifier(text, None, "text_judge.model", EvaluationConfig().paths).location
    ).as_posix(),
    "data.truthfulqa.path, for people's labels": human_labels,
}
READERS = REFUSED_WHERE_MISSING | READ_ELSEWHERE


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A working folder with a configuration, and a project folder."""
    work, project = tmp_path / "work", tmp_path / "project"
    fill(work / "one")
    project.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(paths, "PROJECT_ROOT", project)
    return work, project


# ------------------------------------------------------------------ the same for all
@pytest.mark.parametrize("key", READERS)
def test_the_working_folder_comes_first_then_the_project(places: tuple[Path, Path], key: str) -> None:
    work, project = places
    read = READERS[key]
    assert read(fill(project / NAME).as_posix()) == (project / NAME).as_posix()  # absolute
    assert read(NAME) == (project / NAME).as_posix()
    assert read(fill(work / NAME).as_posix()) == (work / NAME).as_posix()
    assert read(NAME) == read(f"./{NAME}") == (work / NAME).as_posix()


@pytest.mark.parametrize("key", REFUSED_WHERE_MISSING)
def test_where_nothing_is_there_both_places_are_named(places: tuple[Path, Path], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        READERS[key](NAME)
    said = str(caught.value)
    assert key.removesuffix(" of the pipeline") in said and "\n" not in said
    for place in places:
        assert f"{place / NAME}" in said and "is not there" in said


# ------------------------------------------------------------------ through the stages
HH_ROW = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}


def write_hh(folder: Path, rows: int) -> None:
    folder.joinpath("harmless-base").mkdir(parents=True)
    for split in ("train", "test"):
        text = (json.dumps(HH_ROW) + "\n") * rows
        (folder / "harmless-base" / f"{split}.jsonl").write_text(text, encoding="utf-8")


def test_preference_data_of_the_working_folder_is_downloaded(places: tuple[Path, Path]) -> None:
    work, project = places
    write_hh(work / "hh", 2)
    write_hh(project / "hh", 3)
    (project / "TruthfulQA.csv").write_text(
        "Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,So.,So.,No.\n", encoding="utf-8"
    )
    hh = {"path": "hh", "helpful_subsets": ["harmless-base"]}
    data = {"approach": "hh_truthfulqa", "hh_rlhf": hh, "truthfulqa": {"path": "TruthfulQA.csv"}}
    config = RewardModelConfig.model_validate({"artifact_root": str(work / "artifacts"), "data": data})
    raw = download_dataset(config)
    manifests = {p.parent.name: json.loads(p.read_text("utf-8")) for p in raw.glob("*/manifest.json")}
    assert [file["rows"] for file in manifests["hh_rlhf"]["files"].values()] == [2, 2]
    assert [file["rows"] for file in manifests["truthfulqa"]["files"].values()] == [1]
    assert (
        manifests["hh_rlhf"]["path"] == "hh"
    )  # as it is written, so that what was fetched before stays fetched


def test_a_base_model_of_the_working_folder_is_loaded(
    places: tuple[Path, Path], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_base.parent)
    artifacts = RewardModelConfig(artifact_root=str(places[0])).paths
    by_name, by_path = (ModelConfig(name=name, revision=None) for name in (tiny_base.name, str(tiny_base)))
    assert len(load_tokenizer(by_name, artifacts)) == len(load_tokenizer(by_path, artifacts)) > 0
    assert base_model_key(by_name, artifacts) == base_model_key(by_path, artifacts)
    absent = ModelConfig(name="nobody/nothing", revision=None)
    with pytest.raises(ConfigError, match=r"^model\.name: cannot load 'nobody/nothing'") as caught:
        load_tokenizer(absent, artifacts)
    for place in (tiny_base.parent, places[1]):
        assert f"{place / 'nobody' / 'nothing'} is not there" in str(caught.value)


def test_a_key_of_files_is_of_those_that_are_read_and_names_no_folder_above(
    places: tuple[Path, Path],
) -> None:
    work, project = places
    by_project = content_key(MtBenchConfig(path=fill(project / NAME).as_posix()))
    assert content_key(MtBenchConfig(path=NAME)) == by_project
    by_work = content_key(MtBenchConfig(path=fill(work / NAME).as_posix()))
    assert content_key(MtBenchConfig(path=NAME)) == by_work != by_project
    assert {Path(name).parent.as_posix() for name, _, _ in by_work} == {"files"}

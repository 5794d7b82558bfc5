"""Sources: local folders in the hub's layout, and a hub that is faked or cannot be reached."""

import gzip
import json
import re

import datasets
import pytest

from prmd.config.shared import DataConfig
from prmd.data import embedded, readers
from prmd.data.sources import plan_source, required_sources
from prmd.errors import ConfigError, DataError

HH_ROW = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
CSV = (
    "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    'Adversarial,Food,Is soup wet?,Yes,"Yes; It is wet.; ",No; It is dry,none\n'
)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            stream.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def data(source, **settings):
    return DataConfig.model_validate({source: settings})


def rows_of(files):
    return {file.label: list(file.read()) for file in files}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"approach": "hh_truthfulqa"}, ("hh_rlhf", "truthfulqa")),
        ({"approach": "pku_safe"}, ("pku_safe_rlhf",)),
        (
            {"approach": "pku_safe", "pku_safe_rlhf": {"honest": "truthfulqa"}},
            ("pku_safe_rlhf", "truthfulqa"),
        ),
        ({"approach": "embedded"}, ("embedded",)),
    ],
)
def test_required_sources(settings, names):
    assert required_sources(DataConfig.model_validate(settings)) == names


# ------------------------------------------------------------------ local folders
def hh_folder(tmp_path):
    for subset in ("helpful-base", "harmless-base"):
        write_lines(tmp_path / subset / "train.jsonl.gz", [HH_ROW] * 2)
        write_lines(tmp_path / subset / "test.jsonl", [HH_ROW])
    return data("hh_rlhf", path=str(tmp_path), helpful_subsets=["helpful-base"])


def test_local_hh_rlhf_reads_zipped_and_plain_files(tmp_path):
    files = plan_source("hh_rlhf", hh_folder(tmp_path))
    assert [(f.label, f.upstream_split, f.name) for f in files][:2] == [
        ("helpful-base/train", "train", "helpful-base-train.jsonl"),
        ("helpful-base/test", "test", "helpful-base-test.jsonl"),
    ]
    assert {label: len(rows) for label, rows in rows_of(files).items()} == {
        "helpful-base/train": 2,
        "helpful-base/test": 1,
        "harmless-base/train": 2,
        "harmless-base/test": 1,
    }


def test_relative_paths_start_at_the_working_directory(tmp_path, monkeypatch):
    hh_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    files = plan_source("hh_rlhf", data("hh_rlhf", path="mine", helpful_subsets=["helpful-base"]))
    assert len(files) == 4


@pytest.mark.parametrize("subset", ["", ".", "red-team-attempts", "../secrets"])
def test_the_bare_repository_and_red_team_rows_are_refused(tmp_path, subset):
    with pytest.raises(ConfigError, match="red-team"):
        plan_source("hh_rlhf", data("hh_rlhf", path=str(tmp_path), helpful_subsets=[subset]))


@pytest.mark.parametrize("source", ["hh_rlhf", "truthfulqa", "pku_safe_rlhf"])
def test_wrong_local_path_names_the_key(tmp_path, source):
    for path in (str(tmp_path / "absent"), "./absent", "a/b/c"):
        with pytest.raises(
            ConfigError, match=rf"^data\.{source}\.path: .*neither an existing file or folder nor a hub id"
        ):
            plan_source(source, data(source, path=path))
    with pytest.raises(ConfigError, match=rf"^data\.{source}\.path: .*layout"):
        plan_source(source, data(source, path=str(tmp_path)))


TRUTHFUL_ROW = {
    "question": "Is soup wet?",
    "best_answer": "Yes.",
    "correct_answers": ["Yes.", "It is wet."],
    "incorrect_answers": ["No.", "It is dry."],
    "type": "Adversarial",
    "category": "Food",
}


def test_truthfulqa_csv_and_hub_parquet_give_the_same_rows(tmp_path):
    (tmp_path / "TruthfulQA.csv").write_text(CSV, encoding="utf-8")
    assert rows_of(plan_source("truthfulqa", data("truthfulqa", path=str(tmp_path)))) == {
        "generation": [TRUTHFUL_ROW]
    }
    folder = tmp_path / "hub" / "generation"
    folder.mkdir(parents=True)
    hub_row = {
        **TRUTHFUL_ROW,
        "best_answer": "Yes",
        "correct_answers": ["Yes", "It is wet.", " "],
        "source": "none",
    }
    datasets.Dataset.from_list([hub_row]).to_parquet(folder / "validation-00000-of-00001.parquet")
    files = plan_source("truthfulqa", data("truthfulqa", path=str(tmp_path / "hub")))
    assert rows_of(files) == {"generation": [TRUTHFUL_ROW]}
    assert files[0].upstream_split is None


def test_truthfulqa_csv_without_its_columns(tmp_path):
    (tmp_path / "TruthfulQA.csv").write_text("Question,Best Answer\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="Correct Answers"):
        rows_of(plan_source("truthfulqa", data("truthfulqa", path=str(tmp_path))))


def test_pku_layouts(tmp_path):
    row = {"prompt": "p"}
    hub = tmp_path / "hub"
    write_lines(hub / "data" / "Alpaca-7B" / "train.jsonl", [row, row])
    write_lines(hub / "data" / "Alpaca-7B" / "test.jsonl", [row])
    files = plan_source("pku_safe_rlhf", data("pku_safe_rlhf", path=str(hub)))
    assert {f.label: f.upstream_split for f in files} == {
        "Alpaca-7B/train": "train",
        "Alpaca-7B/test": "test",
    }
    flat = tmp_path / "flat"
    write_lines(flat / "some rows.jsonl.gz", [row])
    (flat / "array.json").write_text(json.dumps([row, row]), encoding="utf-8")
    files = plan_source("pku_safe_rlhf", data("pku_safe_rlhf", path=str(flat)))
    assert {f.name: f.upstream_split for f in files} == {"array.jsonl": None, "some--rows.jsonl": None}
    assert rows_of(files) == {"array": [row, row], "some rows": [row]}
    single = plan_source("pku_safe_rlhf", data("pku_safe_rlhf", path=str(flat / "array.json")))
    assert rows_of(single) == {"array": [row, row]}


def test_two_files_of_one_name_are_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{}])
    write_lines(tmp_path / "a.json", [{}])
    with pytest.raises(ConfigError, match=r"two files would both become a\.jsonl"):
        plan_source("pku_safe_rlhf", data("pku_safe_rlhf", path=str(tmp_path)))


def test_missing_embedded_file(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "EMBEDDED_DIR", tmp_path)
    with pytest.raises(ConfigError, match=r"helpful\.jsonl: missing"):
        plan_source("embedded", DataConfig())


# ------------------------------------------------------------------ the hub
@pytest.fixture
def hub(monkeypatch):
    """Records what is asked of the hub; `answer` is returned or raised."""

    class Hub:
        asked: list = []  # noqa: RUF012  # one instance per test
        answer: object = None

        def __call__(self, path, name=None, *, data_dir=None, revision=None):
            self.asked.append((path, name, data_dir, revision))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    fake = Hub()
    fake.asked = []
    monkeypatch.setattr(datasets, "load_dataset", fake)
    readers._load.cache_clear()
    yield fake
    readers._load.cache_clear()


def test_hub_is_asked_for_named_subsets_at_the_pinned_revision(hub):
    hub.answer = {"train": [HH_ROW, HH_ROW], "test": [HH_ROW]}
    settings = DataConfig()
    files = plan_source("hh_rlhf", settings)
    assert hub.asked == []  # planning fetches nothing
    assert len(rows_of(files)["helpful-online/train"]) == 2
    subsets = ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base")
    assert hub.asked == [("Anthropic/hh-rlhf", None, s, settings.hh_rlhf.revision) for s in subsets]
    assert files[0].origin == f"Anthropic/hh-rlhf@{settings.hh_rlhf.revision}"


def test_hub_truthfulqa_and_pku(hub):
    hub.answer = {"validation": [TRUTHFUL_ROW]}
    settings = DataConfig()
    assert rows_of(plan_source("truthfulqa", settings)) == {"generation": [TRUTHFUL_ROW]}
    assert hub.asked == [("truthfulqa/truthful_qa", "generation", None, settings.truthfulqa.revision)]
    hub.answer = {"train": [{}, {}], "test": [{}]}
    assert {k: len(v) for k, v in rows_of(plan_source("pku_safe_rlhf", settings)).items()} == {
        "default/train": 2,
        "default/test": 1,
    }


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("hh_rlhf", ConnectionError("Couldn't reach 'Anthropic/hh-rlhf' on the Hub (OfflineModeIsEnabled)")),
        ("truthfulqa", datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist\non the Hub")),
        ("pku_safe_rlhf", TimeoutError()),
    ],
)
def test_unreachable_hub_is_one_line_that_names_the_key(hub, source, error):
    hub.answer = error
    with pytest.raises(ConfigError) as caught:
        rows_of(plan_source(source, DataConfig()))
    message = str(caught.value)
    assert message.startswith(f"data.{source}.path: ") and "\n" not in message
    assert "local folder in the hub's file layout" in message


def of_two_kinds():
    """As `datasets` raises it: what is wrong is in the cause alone."""
    error = datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = ValueError("Expected object or value in part-3.json")
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"), "missing. Please pick one among"),
        (RuntimeError("Dataset scripts are no longer supported, but found prefs.py"), "but found prefs.py"),
        (datasets.exceptions.DatasetGenerationCastError("All files must have\nthe same columns"), "have the same"),
        (of_two_kinds(), "Expected object or value in part-3.json"),
    ],
)  # fmt: skip
def test_a_hub_data_set_that_is_not_one_table_is_one_line(hub, error, said):
    hub.answer = error
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        rows_of(plan_source("truthfulqa", DataConfig()))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.truthfulqa.path: ")


def test_a_mistake_of_ours_keeps_its_traceback(hub):
    hub.answer = ValueError("too many values to unpack")
    with pytest.raises(ValueError, match="unpack"):
        rows_of(plan_source("truthfulqa", DataConfig()))


def test_hub_data_set_without_the_split(hub):
    hub.answer = {"train": []}
    with pytest.raises(ConfigError, match=r"data\.truthfulqa\.path: .*no split 'validation'"):
        rows_of(plan_source("truthfulqa", DataConfig()))

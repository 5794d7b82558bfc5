"""Where artifacts lie, that no name leads out of the artifact root, and what a path given by a user means."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prmd.artifacts.paths import (
    PROJECT_ROOT,
    ArtifactPaths,
    beside,
    find_user_path,
    places_tried,
    resolve_artifact_root,
    resolve_user_path,
    safe_name,
)
from prmd.errors import ConfigError

PATHS = ArtifactPaths(Path("root"), "embedded")
BAD_NAMES = ["", ".", "..", "../x", "a/b", "a\\b", "/abs", "C:x", "a..b", ".hidden", "a b", "a\n"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (PATHS.raw("hh_rlhf"), "data/raw/hh_rlhf"),
        (PATHS.split("honest", "judge"), "data/processed/embedded/honest/judge.jsonl"),
        (PATHS.base_model("Qwen/Qwen2.5-3B"), "models/base/Qwen--Qwen2.5-3B"),
        (PATHS.reward_model("helpful"), "models/reward_models/embedded/helpful_rm"),
        (PATHS.policy("cvar"), "models/policy_models/embedded/cvar"),
        (PATHS.policy("cvar", "beta0.2"), "models/policy_models/embedded/cvar-beta0.2"),
        (PATHS.judge("honest"), "models/judges/embedded/honest"),
        (PATHS.cache("rewards", "0a1b"), "data/cache/rewards-0a1b"),
        (PATHS.logs("reward_models", "embedded", "helpful"), "logs/reward_models/embedded/helpful"),
        (PATHS.runs("one"), "logs/runs/one"),
        (PATHS.step_results, "outputs/step_results"),
        (PATHS.visualizations, "outputs/visualizations/embedded"),
        (PATHS.reward_analysis, "outputs/reward_analysis/embedded"),
        (PATHS.metrics, "outputs/metrics/embedded"),
        (PATHS.benchmark("truthfulqa"), "outputs/benchmarks/truthfulqa/embedded"),
        (PATHS.report, "outputs/report/index.html"),
    ],
)
def test_every_artifact_has_its_documented_place(path: Path, expected: str) -> None:
    assert path.as_posix() == f"root/{expected}"


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_would_leave_the_root_or_break_a_file_system_are_refused(name: str) -> None:
    for attempt in (
        lambda: ArtifactPaths(Path("root"), name),
        lambda: PATHS.raw(name),
        lambda: PATHS.split(name, "train"),
        lambda: PATHS.policy(name),
        lambda: PATHS.logs("reward_models", name),
        lambda: PATHS.benchmark(name),
    ):
        with pytest.raises(ConfigError, match="cannot name an artifact"):
            attempt()


@pytest.mark.parametrize("run_name", ["../x", "a/b", "..", "a:b"])
def test_a_run_name_cannot_leave_the_root_either(run_name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an artifact"):
        PATHS.policy("cvar", run_name)


@given(st.text(max_size=40))
def test_safe_name_is_always_one_portable_component(text: str) -> None:
    name = safe_name(text)
    path = ArtifactPaths(Path("root"), "embedded").base_model(text)
    assert path.parent == Path("root/models/base") and name
    assert not set(name) & set('/\\:*?"<>|\0\n') and name not in (".", "..")


def test_artifact_root_is_the_project_unless_absolute(tmp_path: Path) -> None:
    assert resolve_artifact_root(".") == PROJECT_ROOT
    assert resolve_artifact_root("x/y") == PROJECT_ROOT / "x" / "y"
    assert resolve_artifact_root(str(tmp_path)) == tmp_path.resolve()
    assert resolve_artifact_root("~/x") == (Path.home() / "x").resolve()


# ------------------------------------------------------------------ what users name
@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The working folder, the project folder; `~` is a third."""
    work, project, home = (tmp_path / name for name in ("work", "project", "home"))
    for folder in (work, project, home):
        folder.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("prmd.artifacts.paths.PROJECT_ROOT", project)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(home))
    return work, project


def test_a_relative_path_is_of_the_working_folder_else_of_the_project(places: tuple[Path, Path]) -> None:
    work, project = places
    (project / "x").mkdir()
    assert resolve_user_path("x", "key", "x") == find_user_path(Path("x")) == project / "x"
    (work / "x").mkdir()
    assert resolve_user_path("x", "key", "x") == find_user_path("x") == work / "x"
    assert resolve_user_path(".", "key", "a folder", "folder") == work
    assert resolve_user_path("../project/x", "key", "x").resolve() == project / "x"


def test_absolute_paths_and_those_from_home_mean_themselves(places: tuple[Path, Path]) -> None:
    work, project = places
    home = work.parent / "home"
    for folder in (work, project, home):
        (folder / "x").mkdir()
    assert resolve_user_path(str(project / "x"), "key", "x") == project / "x"
    assert resolve_user_path("~/x", "key", "x") == find_user_path(Path("~/x")) == home / "x"
    for text in (str(work.parent / "y"), "~/y"):
        with pytest.raises(ConfigError) as caught:
            resolve_user_path(text, "key", "y")
        assert str(caught.value).count("is not there") == 1  # no other place would be what was meant


def test_nothing_there_names_key_what_was_wanted_and_both_places(places: tuple[Path, Path]) -> None:
    work, project = places
    with pytest.raises(ConfigError) as caught:
        resolve_user_path("some/x", "text_judge.file", "a file of verdicts", "file")
    tried = f"{work / 'some' / 'x'} is not there, {project / 'some' / 'x'} is not there"
    assert (
        str(caught.value)
        == f"text_judge.file: got some/x, wanted a file of verdicts; {tried}; correct the path"
    )
    assert find_user_path("some/x") is None and places_tried("some/x") == tried


def test_what_is_of_the_wrong_kind_is_passed_over_and_said(places: tuple[Path, Path]) -> None:
    work, project = places
    (work / "x").write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="wanted a folder of data; ") as caught:
        resolve_user_path("x", "key", "a folder of data", "folder")
    assert f"{work / 'x'} is a file, {project / 'x'} is not there" in str(caught.value)
    assert find_user_path("x") == find_user_path("x", "file") == work / "x"
    (project / "x").mkdir()
    assert find_user_path("x", "folder") == project / "x"
    (work / "x").unlink()
    with pytest.raises(ConfigError) as caught:
        resolve_user_path("x", "key", "a file", "file")
    assert f"{work / 'x'} is not there, {project / 'x'} is a folder" in str(caught.value)


@pytest.mark.parametrize("text", ["", "x" * 5000, "~nobody-of-this-name/x", "a\0b"])
def test_text_that_can_be_no_path_is_refused_as_any_other(places: tuple[Path, Path], text: str) -> None:
    assert find_user_path(text) is None
    with pytest.raises(ConfigError, match=r"^key: got .*; correct the path$"):
        resolve_user_path(text, "key", "a file")


def test_beside_starts_at_the_folder_it_is_given(places: tuple[Path, Path]) -> None:
    work, project = places
    assert beside(project, "x/y.yaml") == project / "x" / "y.yaml"
    assert beside(project, str(work / "x")) == work / "x"
    assert beside(project, "~/x") == work.parent / "home" / "x"

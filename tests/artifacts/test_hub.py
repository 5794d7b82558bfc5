"""Where the hub's files lie, on caches in the hub's layout: the project's, the user's, whole and in part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prmd.artifacts import hub
from prmd.artifacts.paths import PROJECT_ROOT, ArtifactPaths

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}),
    "1.safetensors": "x",
    "2.safetensors": "y",
}
NAMES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME")


def snapshot(
    cache: Path, files: dict[str, str], *, kind: str = "model", repository: str = "org/name"
) -> Path:
    """A snapshot as the hub's client lays it out: blobs, links to them, and what the branch points at."""
    folder = cache / f"{kind}s--{repository.replace('/', '--')}"
    held = folder / "snapshots" / COMMIT
    for number, (name, text) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040d}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(text, encoding="utf-8")
        (held / name).parent.mkdir(parents=True, exist_ok=True)
        (held / name).hardlink_to(blob)  # Windows may have no symbolic links
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return held


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The project's cache, chosen by this process, and the user's own."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    project = ArtifactPaths(tmp_path / "root", "any").hub_cache
    monkeypatch.setattr(hub, "_project", [project])
    return project, tmp_path / "home" / "huggingface" / "hub"


@pytest.mark.parametrize("revision", [COMMIT, "main", None])
def test_a_whole_model_of_the_user_is_used_where_it_lies(
    revision: str | None, caches: tuple[Path, Path]
) -> None:
    snapshot(caches[1], WHOLE)
    assert hub.cache_of("org/name", revision) == str(caches[1])
    assert hub.cache_of("org/other", revision) is None
    assert hub.cache_of("org/name", "f" * 40) is None and hub.cache_of("org/name", "v2") is None


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "2.safetensors"])
def test_a_part_of_a_model_is_left_alone_but_without_a_connection(
    missing: str, caches: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = {name: text for name, text in WHOLE.items() if name != missing}
    snapshot(caches[1], part)
    assert hub.cache_of("org/name", COMMIT) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.cache_of("org/name", COMMIT) == str(caches[1])
    snapshot(caches[0], part)
    assert hub.cache_of("org/name", COMMIT) is None  # the project's own cache has it too


def test_adapters_need_no_tokenizer(caches: tuple[Path, Path]) -> None:
    held = snapshot(caches[1], {"adapter_config.json": "{}"})
    assert hub.cache_of("org/name") is None
    (held / "adapter_model.safetensors").write_text("x", encoding="utf-8")
    assert hub.cache_of("org/name") == str(caches[1])


def test_a_cache_that_the_user_chose_is_the_only_one(
    caches: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_project", [])
    snapshot(caches[1], WHOLE)
    snapshot(caches[1], {"a.json": "{}"}, kind="dataset")
    assert hub.cache_of("org/name", COMMIT) is None and hub.whole_dataset("org/name", COMMIT) is None


def test_a_data_set_is_whole_where_its_listing_says_so(caches: tuple[Path, Path]) -> None:
    files = {"README.md": "text", "part/train.jsonl": "{}\n"}
    held = snapshot(caches[1], files, kind="dataset")
    assert hub.whole_dataset("org/name", COMMIT) is None  # nobody knows what else belongs to it
    listing = held.parents[1] / "trees" / f"{COMMIT}.json"
    listing.parent.mkdir()
    sizes = {name: {"size": len(text), "blob_id": "0"} for name, text in files.items()}
    listing.write_text(json.dumps({"format_version": 1, "files": sizes}), encoding="utf-8")
    assert hub.whole_dataset("org/name", COMMIT) == held == hub.whole_dataset("org/name", "main")
    sizes["part/test.jsonl"] = {"size": 7, "blob_id": "1"}
    listing.write_text(json.dumps({"format_version": 1, "files": sizes}), encoding="utf-8")
    assert hub.whole_dataset("org/name", COMMIT) is None
    listing.write_text("[]", encoding="utf-8")
    assert hub.whole_dataset("org/name", COMMIT) is None


def test_rows_of_a_whole_data_set_are_read_where_they_lie(
    caches: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prmd.data import readers

    files = {"train.jsonl": '{"text": "a"}\n{"text": "b"}\n', "test.jsonl": '{"text": "c"}\n'}
    held = snapshot(caches[1], files, kind="dataset", repository="org/rows")
    listing = held.parents[1] / "trees" / f"{COMMIT}.json"
    listing.parent.mkdir()
    sizes = {name: {"size": len(text), "blob_id": "0"} for name, text in files.items()}
    listing.write_text(json.dumps({"format_version": 1, "files": sizes}), encoding="utf-8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = readers.split_rows("key", "org/rows", COMMIT, "train")
    assert [row["text"] for row in rows] == ["a", "b"]


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from prmd.artifacts import hub
hub.use_project_cache(Path(sys.argv[2]))
from huggingface_hub import constants
print(constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH, sep="\\n")
"""


@pytest.mark.parametrize("chosen", [None, "HF_HOME", "HF_HUB_CACHE"])
def test_the_client_downloads_below_the_root_unless_the_user_says_where_and_the_login_stays(
    chosen: str | None, tmp_path: Path
) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key not in NAMES and key != "HF_TOKEN_PATH"
    }
    environment["XDG_CACHE_HOME"] = str(tmp_path / "home")
    if chosen:
        environment[chosen] = str(tmp_path / "chosen")
    project = tmp_path / "root" / "data" / "cache" / "huggingface"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(PROJECT_ROOT), str(project)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    home = tmp_path / "home" / "huggingface"
    wanted = {
        None: (project, home / "token"),
        "HF_HOME": (tmp_path / "chosen" / "hub", tmp_path / "chosen" / "token"),
        "HF_HUB_CACHE": (tmp_path / "chosen", home / "token"),
    }
    assert tuple(map(Path, done.stdout.splitlines())) == wanted[chosen]


def test_a_client_that_is_imported_already_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_project", [])
    monkeypatch.setitem(sys.modules, "huggingface_hub", sys)
    hub.use_project_cache(tmp_path)
    assert "HF_HUB_CACHE" not in os.environ and hub._project == []

"""Fetching into data/raw: manifests, resuming, and noticing what does not fit any more."""

import hashlib
import json
import logging

import pytest

from prmd.config.shared import RewardModelConfig
from prmd.data import embedded
from prmd.data import raw as data_raw
from prmd.data.raw import fetch_source, read_manifest, read_source
from prmd.errors import ConfigError, DataError

ROW = {"chosen": "\n\nHuman: a\n\nAssistant: é", "rejected": "\n\nHuman: a\n\nAssistant: c"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def config(tmp_path):
    for subset in ("helpful-base", "harmless-base"):
        write(tmp_path / "hh" / subset / "train.jsonl", [ROW] * 3)
        write(tmp_path / "hh" / subset / "test.jsonl", [ROW])
    return RewardModelConfig.model_validate(
        {
            "artifact_root": str(tmp_path / "root"),
            "data": {"hh_rlhf": {"path": str(tmp_path / "hh"), "helpful_subsets": ["helpful-base"]}},
        }
    )


def read(config, source="hh_rlhf"):
    return list(read_source(source, config.data, config.paths))


def test_manifest_says_where_from_how_many_and_which_bytes(config):
    manifest = fetch_source("hh_rlhf", config.data, config.paths, force=False)
    directory = config.paths.raw("hh_rlhf")
    assert manifest == json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["complete"] and manifest["path"] == config.data.hh_rlhf.path
    assert manifest["revision"] == config.data.hh_rlhf.revision
    for name, entry in manifest["files"].items():
        content = (directory / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["rows"] == len(content.splitlines())
    files = read(config)
    assert [(f.label, f.upstream_split, len(f.rows)) for f in files] == [
        ("helpful-base/train", "train", 3),
        ("helpful-base/test", "test", 1),
        ("harmless-base/train", "train", 3),
        ("harmless-base/test", "test", 1),
    ]
    assert list(files[0].rows)[2] == ROW and files[0].where(2) == "hh_rlhf/helpful-base/train:3"


def test_interrupted_fetch_is_resumed(config, monkeypatch, caplog):
    real, written = data_raw._write_file, []

    def interrupted(source, directory, file):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.label)
        return real(source, directory, file)

    monkeypatch.setattr(data_raw, "_write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_source("hh_rlhf", config.data, config.paths, force=False)
    with pytest.raises(DataError, match="interrupted"):
        read_manifest("hh_rlhf", config.data, config.paths)
    written.clear()
    monkeypatch.setattr(data_raw, "_write_file", lambda s, d, f: written.append(f.label) or real(s, d, f))
    with caplog.at_level(logging.INFO, "prmd"):
        fetch_source("hh_rlhf", config.data, config.paths, force=False)
    assert written == ["harmless-base/train", "harmless-base/test"]
    assert "kept helpful-base-train.jsonl (3 rows" in caplog.text
    assert len(read(config)) == 4


def test_damaged_and_changed_files_are_fetched_again_and_force_fetches_all(config, tmp_path, monkeypatch):
    fetch_source("hh_rlhf", config.data, config.paths, force=False)
    real, written = data_raw._write_file, []
    monkeypatch.setattr(data_raw, "_write_file", lambda s, d, f: written.append(f.label) or real(s, d, f))
    raw = config.paths.raw("hh_rlhf")
    (raw / "helpful-base-test.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"helpful-base-test\.jsonl: missing or changed.*download_dataset"):
        read(config)
    write(tmp_path / "hh" / "harmless-base" / "train.jsonl", [ROW] * 5)
    fetch_source("hh_rlhf", config.data, config.paths, force=False)
    assert written == ["helpful-base/test", "harmless-base/train"]
    assert [len(f.rows) for f in read(config)] == [3, 1, 5, 1]
    written.clear()
    fetch_source("hh_rlhf", config.data, config.paths, force=True)
    assert len(written) == 4


def test_other_subsets_need_another_fetch_which_removes_leftovers(config):
    fetch_source("hh_rlhf", config.data, config.paths, force=False)
    fewer = config.model_copy(
        update={
            "data": config.data.model_copy(
                update={
                    "hh_rlhf": config.data.hh_rlhf.model_copy(update={"harmless_subsets": ("helpful-base",)})
                }
            )
        }
    )
    with pytest.raises(DataError, match=r"downloaded with .*harmless-base.*download_dataset"):
        read(fewer)
    fetch_source("hh_rlhf", fewer.data, fewer.paths, force=False)
    left = {p.name for p in config.paths.raw("hh_rlhf").iterdir()}
    assert left == {"helpful-base-train.jsonl", "helpful-base-test.jsonl", "manifest.json"}


def test_not_downloaded_names_the_command(config):
    with pytest.raises(DataError, match=r"python 1_data_preparation/download_dataset\.py"):
        read(config)


def test_full_disk_is_refused_before_anything_is_written(config, monkeypatch):
    def full(path, size):
        raise ConfigError(f"{path}: {size} bytes do not fit")

    monkeypatch.setattr(data_raw, "require_disk", full)
    with pytest.raises(ConfigError, match="do not fit"):
        fetch_source("hh_rlhf", config.data, config.paths, force=False)
    assert not config.paths.raw("hh_rlhf").exists()


def test_embedded_pairs_are_manifested_and_not_copied(config, tmp_path, monkeypatch):
    folder = tmp_path / "embedded"
    for objective in ("helpful", "harmless", "honest"):
        write(folder / f"{objective}.jsonl", [{"id": objective}] * 2)
    monkeypatch.setattr(embedded, "EMBEDDED_DIR", folder)
    monkeypatch.setattr(data_raw, "EMBEDDED_DIR", folder)
    manifest = fetch_source("embedded", config.data, config.paths, force=False)
    assert [entry["rows"] for entry in manifest["files"].values()] == [2, 2, 2]
    assert [p.name for p in config.paths.raw("embedded").iterdir()] == ["manifest.json"]
    assert list(read(config, "embedded")[2].rows) == [{"id": "honest"}] * 2
    write(folder / "honest.jsonl", [{"id": "edited"}])
    with pytest.raises(DataError, match="changed since it was downloaded"):
        read(config, "embedded")

"""What an artifact vouches for: lost and changed files are named, and nothing counts as finished without them."""

import hashlib
import logging
from pathlib import Path

import pytest

from prmd.artifacts import io, locks, runs
from prmd.artifacts.manifest import EVERYTHING, damaged_files, list_files, lost_file
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError, DataError

COMMAND = "python 3_policy_training/pessimistic_dpo.py"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A published artifact with weights, a record of scaling and one kept checkpoint."""
    final = tmp_path / "cvar"
    partial = runs.partial_directory(final, "abc", force=False)
    io.write_text(partial / "adapter_model.safetensors", "weights")
    io.write_json(partial / "adapter_config.json", {"lora_alpha": 8})
    io.write_text(partial / "checkpoints" / "33" / "adapter_model.safetensors", "a third")
    runs.finish_run(partial, config=RewardModelConfig(), inputs={}, fingerprint="abc", clock=runs.start_run())
    runs.publish(partial, final)
    return final


def complaint(policy: Path, *read: str) -> str:
    with pytest.raises(DataError) as caught:
        runs.require_artifact(policy, what="policy cvar", command=COMMAND, read=read)
    text = str(caught.value)
    assert text.startswith("policy cvar is damaged") and COMMAND in text and "\n" not in text
    return text


def test_the_record_lists_every_file_with_size_and_sha256(policy: Path) -> None:
    files = runs.read_run(policy)["files"]
    assert set(files) == {
        *("adapter_model.safetensors", "adapter_config.json", "config.yaml", "fingerprint.json"),
        "checkpoints/33/adapter_model.safetensors",
    }
    expected = {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert files["adapter_model.safetensors"] == expected
    assert files == list_files(policy)


def test_a_file_that_is_lost_is_made_again_and_never_reused(
    policy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert runs.is_current(policy, "abc") and not caplog.records
    (policy / "adapter_model.safetensors").unlink()
    assert not runs.is_current(policy, "abc")
    [line] = [record.getMessage() for record in caplog.records]
    assert "adapter_model.safetensors is missing" in line and "made again" in line
    assert "adapter_model.safetensors is missing" in complaint(policy)
    runs.refuse_replacing(policy, "abc", what="policy cvar")  # it may be built again without --force
    with pytest.raises(ConfigError, match="other settings"):
        runs.refuse_replacing(policy, "abd", what="policy cvar")
    runs.partial_directory(policy, "abc", force=False)
    locks.let_go(policy)


@pytest.mark.parametrize("content", ["", "weight", "weights and more"])
def test_another_size_counts_as_lost(policy: Path, content: str) -> None:
    io.write_text(policy / "adapter_model.safetensors", content)
    assert not runs.is_current(policy, "abc")
    assert f"has {len(content)} bytes, 7 were written" in complaint(policy)


def test_changed_content_is_noticed_where_it_is_read(policy: Path) -> None:
    io.write_text(policy / "adapter_model.safetensors", "Weights")
    assert runs.is_current(policy, "abc")
    assert not runs.is_current(policy, "abc", read=("adapter_*",))
    runs.require_artifact(policy, what="policy cvar", command=COMMAND, read=("config.yaml",))
    said = complaint(policy, *EVERYTHING)
    assert "adapter_model.safetensors was changed" in said and said.endswith(f"{COMMAND} --force")


def test_kept_checkpoints_may_be_deleted_and_are_compared_where_they_are_named(policy: Path) -> None:
    kept = policy / "checkpoints" / "33" / "adapter_model.safetensors"
    io.write_text(kept, "a Third")
    runs.require_artifact(policy, what="policy cvar", command=COMMAND, read=EVERYTHING)
    assert "checkpoints/33/adapter_model" in complaint(policy, "checkpoints/33/*")
    kept.unlink()
    runs.require_artifact(policy, what="policy cvar", command=COMMAND, read=(*EVERYTHING, "checkpoints/33/*"))
    assert runs.is_current(policy, "abc")


def test_a_folder_that_lost_a_file_is_not_published(policy: Path) -> None:
    partial = runs.partial_directory(policy, "abd", force=False)
    io.write_text(partial / "adapter_model.safetensors", "other weights")
    runs.finish_run(partial, config=RewardModelConfig(), inputs={}, fingerprint="abd", clock=runs.start_run())
    (partial / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"adapter_model\.safetensors is missing"):
        runs.publish(partial, policy)
    assert runs.is_current(policy, "abc")  # what was there stays
    locks.let_go(policy)


def test_an_empty_weight_file_is_lost_even_where_it_was_written_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "notes.txt").touch()
    assert lost_file(tmp_path, list_files(tmp_path)) == "model.safetensors is empty"


def test_an_artifact_without_a_list_is_accepted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    io.write_text(tmp_path / "model.safetensors", "weights")
    io.write_json(tmp_path / "run.json", {"fingerprint": "abc", "seconds": 1.0})
    with caplog.at_level(logging.INFO, logger="prmd"):
        assert runs.is_current(tmp_path, "abc") and runs.is_current(tmp_path, "abc")
    assert [r.getMessage() for r in caplog.records if "its 1 files are accepted" in r.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    record = runs.read_run(tmp_path)
    assert record["seconds"] == 1.0 and set(record["files"]) == {"model.safetensors"}
    io.write_text(tmp_path / "model.safetensors", "Weights")
    assert "model.safetensors was changed" in complaint(tmp_path, *EVERYTHING)


def test_what_an_earlier_version_finished_counts_and_is_mended_by_the_key_it_gave(policy: Path) -> None:
    assert runs.is_current(policy, "today", "abc") and not runs.is_current(policy, "today", "older")
    io.write_json(policy / "adapter_config.json", {"lora_alpha": 9})
    assert not runs.is_current(policy, "today", "abc", read=("adapter_*",))
    runs.refuse_replacing(policy, "today", "abc", what="policy cvar")
    with pytest.raises(ConfigError, match="other settings"):
        runs.refuse_replacing(policy, "today", "older", what="policy cvar")
    partial = runs.partial_directory(policy, "today", force=False)
    runs.take_over(policy, partial, "today", "abc", made_again=frozenset({"adapter_config.json"}))
    assert (partial / "adapter_model.safetensors").read_bytes() == b"weights"
    assert io.read_json(partial / runs.FINGERPRINT_FILE) == {"fingerprint": "today"}
    locks.let_go(policy)


def test_what_the_own_stage_writes_anew_is_vouched_for_again(policy: Path) -> None:
    runs.vouch_again(io.write_json(policy / "adapter_config.json", {"lora_alpha": 16}))
    runs.require_artifact(policy, what="policy cvar", command=COMMAND, read=EVERYTHING)
    assert damaged_files(policy, runs.read_run(policy)["files"]) == set()


def test_what_is_whole_is_kept_where_only_the_rest_is_made_again(policy: Path) -> None:
    io.write_json(policy / "adapter_config.json", {"lora_alpha": 9})
    weights = frozenset({"adapter_model.safetensors"})
    partial = runs.partial_directory(policy, "abc", force=True)
    runs.take_over(policy, partial, "abc", made_again=weights)
    assert [path.name for path in partial.iterdir()] == ["fingerprint.json"]  # something else is damaged
    runs.take_over(policy, partial, "abc", made_again=frozenset({"adapter_config.json"}))
    names = {p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file()}
    assert names == {
        *("adapter_model.safetensors", "config.yaml", "fingerprint.json"),
        "checkpoints/33/adapter_model.safetensors",
    }
    locks.let_go(policy)

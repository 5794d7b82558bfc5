"""Weights of pairs in the training of policies: what each row of a method weighs, e-DPO's choice, and what TRL cannot take."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipeline import logged
from tiny_tables import table_config, use_tables
from tiny_workspace import write_prepared

from prmd.artifacts import io
from prmd.config.policy import PairsConfig, PolicyConfig, PolicySection
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import read_pairs
from prmd.policies import train
from prmd.policies.train import train_baseline_dpo, train_pessimistic
from prmd.policies.trl_baseline import unweighted_notes
from prmd.training.trainer import PAIR_WEIGHT

METHODS = ("mean", "maxmin", "edpo", "paper_eq5", "dpo", "rdpo", "ipo", "modpo", "dpo_honest")


def weigh(config: PolicyConfig, weight: Any, pairs: int = 6) -> None:
    """Prepared pairs of which pair i of a split has this weight; those of `harmless` have none."""
    write_prepared(config.paths, pairs=pairs)
    for path in (config.paths.split(k, split) for k in OBJECTIVES if k != "harmless" for split in SPLITS):
        rows = io.read_jsonl(path)
        io.write_jsonl(path, [row | {"weight": weight(i)} for i, row in enumerate(rows)])


class CaughtError(Exception):
    """Thrown in the place of a training."""


@pytest.mark.parametrize("method", METHODS)
def test_every_labelled_pair_weighs_what_it_is_given_and_samples_and_held_out_pairs_1(
    method: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = PolicySection(
        methods=(method,), gamma=0.01, weights={"helpful": 0.6, "harmless": 0.3, "honest": 0.1}
    )
    pairs = PairsConfig(reference_samples=6, share=0.5, max_repeats=2)
    config, runs = table_config(tmp_path, tiny_base, policy=policy, pairs=pairs), []
    weigh(config, lambda i: 0.25 + 0.3 * i, pairs=4)
    use_tables(monkeypatch)

    def caught(run: Any, tokenizer: Any) -> None:
        runs.append(run)
        raise CaughtError

    monkeypatch.setattr(train, "run_training", caught)
    with pytest.raises(CaughtError):
        train_pessimistic(config)
    [run] = runs
    stored = {p.id: p.weight for k in OBJECTIVES for p in read_pairs(config.paths, k, "train")}
    wanted = [1.0 if (w := stored.get(name)) is None else w for name in run.data.ids]
    assert run.data.columns[PAIR_WEIGHT].tolist() == pytest.approx(wanted)
    assert PAIR_WEIGHT not in run.eval_data.columns
    drawn = Counter(run.data.ids[i] for i in run.stream)
    assert max(drawn.values()) == 2  # some pairs come twice, with the same weight
    assert len(set(wanted)) > 3 and any(name.startswith("samples of") for name in drawn) is (
        method in METHODS[:4]
    )


def test_weights_of_one_give_the_policies_without_any_and_others_other_ones(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tables(monkeypatch)
    methods, found = ("mean", "edpo", "dpo"), []
    for name, weight in (("none", None), ("ones", lambda i: 1.0), ("others", lambda i: 0.25 + 0.3 * i)):
        policy = PolicySection(methods=methods, gamma=0.01, nll_weight=0.1)
        config = table_config(tmp_path / name, tiny_base, policy=policy)
        weigh(config, weight) if weight else write_prepared(config.paths)
        train_pessimistic(config)
        adapters = [load_file(config.paths.policy(m) / "adapter_model.safetensors") for m in methods]
        found.append([torch.cat([v.flatten() for _, v in sorted(a.items())]) for a in adapters])
    for none, ones, others in zip(*found, strict=True):
        assert torch.equal(none, ones) and not torch.allclose(none, others, atol=1e-4)


def test_the_baseline_says_that_its_pairs_weigh_alike(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tables(monkeypatch)
    monkeypatch.setattr(train, "train_trl_dpo", lambda *_, **__: ([], {}))
    config = table_config(tmp_path, tiny_base)
    weigh(config, lambda i: 0.25 + 0.3 * i)
    with logged() as log:
        train_baseline_dpo(config)
    assert "policy baseline_dpo: TRL's DPO takes no weights of pairs" in log.getvalue()
    [note] = io.read_json(config.paths.policy("baseline_dpo") / "metrics.json")["notes"]
    assert "the method dpo is the same loss with the weights" in note
    alike = [p for p in read_pairs(config.paths, "harmless", "train")]
    assert unweighted_notes(alike) == []

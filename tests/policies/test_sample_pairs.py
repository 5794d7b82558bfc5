"""Pairs of reference samples, the rows of the gamma term, e-DPO's choice of members, and the soup."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import plain_logp
from tiny_scores import ROWS, K, random_scores, reference

from prmd.config.policy import PolicySection
from prmd.errors import ConfigError, DataError
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.policies.edpo import choosing_members, edpo_pair_loss
from prmd.policies.pairs import ReferenceSamples
from prmd.policies.sample_pairs import (
    GAMMA_SAMPLES,
    SamplePair,
    added_pairs,
    draw_sample_pairs,
    merge_streams,
    sides_by_reward,
    with_gamma_samples,
    with_sample_pairs,
)
from prmd.policies.soup import average_policies
from prmd.training.trainer import PAIR_WEIGHT, PairData


def samples_of(prompts: int, n: int, long: tuple[int, ...] = ()) -> ReferenceSamples:
    rows = [
        PrefixRow((1, 50 + i), tuple((60 + j,) * (9 if i in long else 2) + (2,) for j in range(n)))
        for i in range(prompts)
    ]
    return ReferenceSamples(rows, -torch.arange(prompts * n).float().reshape(prompts, n))


# ------------------------------------------------------------------ pairs of samples
@pytest.mark.parametrize(
    ("labelled", "share", "added"), [(60, 0.5, 60), (60, 0.25, 20), (60, 0.0, 0), (7, 0.3, 3)]
)
def test_the_share_is_of_all_pairs(labelled: int, share: float, added: int) -> None:
    assert added_pairs(labelled, share) == added
    assert added / (labelled + added) == pytest.approx(share, abs=0.02)


def test_every_prompt_gets_both_kinds_before_one_repeats() -> None:
    drawn = draw_sample_pairs(samples_of(5, 4, long=(2,)), 20, max_length=6, seed=0)
    assert {pair.prompt for pair in drawn} == {0, 1, 3, 4}
    counts = Counter((pair.prompt, pair.sides is None) for pair in drawn)
    assert set(counts.values()) == {2, 3} and len(counts) == 8  # 20 of 8 kinds
    assert all(a != b and min(a, b) >= 0 and max(a, b) < 4 for a, b in (p.sides for p in drawn if p.sides))
    again = samples_of(5, 4, long=(2,))
    assert draw_sample_pairs(again, 20, max_length=6, seed=0) == drawn
    assert draw_sample_pairs(again, 20, max_length=6, seed=1) != drawn


def test_samples_that_are_all_too_long_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"the samples of all 2 prompts are longer than training\.max_length=6"
    ):
        draw_sample_pairs(samples_of(2, 3, long=(0, 1)), 4, max_length=6, seed=0)
    assert draw_sample_pairs(samples_of(2, 3, long=(0, 1)), 0, max_length=6, seed=0) == []


def test_streams_keep_their_own_order() -> None:
    merged = merge_streams([5, 5, 3, 1, 0, 2], [10, 11, 12, 13], seed=0)
    assert [i for i in merged if i < 10] == [5, 5, 3, 1, 0, 2] and [i for i in merged if i >= 10] == [
        10,
        11,
        12,
        13,
    ]
    assert merged[:6] != [5, 5, 3, 1, 0, 2]


def test_the_higher_reward_is_chosen() -> None:
    robust = torch.tensor([[0.5, -1.0, 3.0], [1.0, 1.0, 1.0]])
    drawn = [SamplePair(0, None), SamplePair(0, (1, 0)), SamplePair(1, None), SamplePair(1, (0, 2))]
    sides = sides_by_reward(drawn, robust).tolist()
    assert sides[:2] == [[2, 1], [0, 1]] and sides[3] == [0, 2]
    assert sides[2][0] != sides[2][1]  # two responses, however equal


def test_added_pairs_carry_the_rewards_and_log_probabilities_of_their_samples() -> None:
    scale, scores = reference(prompts=3, n=5), random_scores(n=3)
    samples = samples_of(3, 5)
    drawn = [SamplePair(2, None), SamplePair(0, (1, 4))]
    robust = scale.by_prompt().mean(dim=(0, 1))
    sides = sides_by_reward(drawn, robust)
    rows, extended = with_sample_pairs(ROWS, scores, drawn=drawn, sides=sides, samples=samples, scale=scale)
    assert rows[:3] == ROWS and torch.equal(extended.rewards[:, :, :3], scores.rewards)
    rewards = scale.rewards.numpy().reshape(K, 20, 3, 5)
    for position, (prompt, pair) in enumerate(zip((2, 0), sides.tolist(), strict=True), start=3):
        np.testing.assert_array_equal(
            extended.rewards[:, :, position].numpy(), rewards[:, :, prompt][..., pair]
        )
        assert extended.ref_logps[position].tolist() == [-(5.0 * prompt + j) for j in pair]
        assert rows[position].prompt_ids == (1, 50 + prompt)
        assert rows[position].responses == tuple((60 + j, 60 + j, 2) for j in pair)
    assert rewards[:, :, 2].mean(axis=(0, 1)).argmax() == sides[0, 0]


def test_gamma_rows_have_samples_behind_the_pair() -> None:
    samples = ReferenceSamples([PrefixRow((1, 50, 60, 70), ((5, 2), (6, 2), (7, 2)))], torch.zeros(1, 3))
    merged = PrefixRow((1, 50, 60), ((70, 80, 2), (70, 90, 2)))  # its template shares a token less
    plain, short = with_gamma_samples([ROWS[0], merged], [0, 0], samples)
    assert GAMMA_SAMPLES == 2 and plain.responses == (*ROWS[0].responses, (5, 2), (6, 2))
    assert short.responses[2:] == ((70, 5, 2), (70, 6, 2)) and short.prompt_ids == (1, 50, 60)
    with pytest.raises(ValueError, match="another prompt"):
        with_gamma_samples([ROWS[1]], [0], samples)


# ------------------------------------------------------------------ e-DPO
def test_members_are_chosen_on_the_whole_effective_batch(policy_model: SequenceLogps) -> None:
    """Two micro-batches, of two pairs and of one, with a choice that neither alone would make."""
    policy, generator = PolicySection(beta=0.5), torch.Generator().manual_seed(0)
    ref = torch.randn(3, 2, generator=generator) * 3 - 20
    logps = np.array(
        [[plain_logp(policy_model.model, list(r.prompt_ids), list(y)) for y in r.responses] for r in ROWS]
    )
    implicit = 0.5 * (logps - ref.numpy()) @ np.array([1.0, -1.0])
    offsets = np.array([[[2.0, -2.0, 0.0], [0.1, 0.1, 4.0], [1.0, 1.0, 1.0]]] * K)  # [K, M=3, pairs]
    targets = implicit + offsets
    columns = {"ref_logps": ref, "member_targets": torch.from_numpy(targets.transpose(2, 0, 1)).float()}
    errors = offsets**2
    whole, first = errors.mean(axis=2).argmin(axis=1), errors[:, :, :2].mean(axis=2).argmin(axis=1)
    assert whole.tolist() == [2] * K and first.tolist() == [1] * K
    sampled = [PrefixRow(row.prompt_ids, (*row.responses, (60, 2), (61, 2))) for row in ROWS]
    chosen = choosing_members(PairData(sampled, columns), beta=0.5, pad_id=0)
    policy_model.train()
    found = chosen(policy_model, [(0, 1), (2,)])
    assert found["selected"].tolist() == [2] * K and policy_model.training
    assert chosen(policy_model, [(2,), (1, 0)])["selected"].tolist() == [2] * K

    batch = {"member_targets": columns["member_targets"][:2]}
    now = torch.from_numpy(implicit[:2]).float()
    trained = edpo_pair_loss(now, batch | found, policy)
    assert trained.tolist() == pytest.approx([1.0, 1.0], abs=1e-3)  # member 2, off by one
    watched = edpo_pair_loss(now, batch, policy)  # held out: the nearest on the batch itself
    assert watched.tolist() == pytest.approx([0.01, 0.01], abs=1e-3)
    alone = [chosen(policy_model, [rows])["selected"].tolist() for rows in ((0, 1), (2,))]
    assert alone == [[1] * K, [0] * K]
    weighted = columns | {PAIR_WEIGHT: torch.tensor([1.45, 1.45, 0.1])}  # the third pair hardly counts
    light = choosing_members(PairData(sampled, weighted), beta=0.5, pad_id=0)
    assert light(policy_model, [(0, 1), (2,)])["selected"].tolist() == [1] * K


# ------------------------------------------------------------------ soup
def write_policy(folder: Path, value: float, name: str = "a.weight") -> Path:
    folder.mkdir()
    tensors = {name: torch.full((2, 3), value, dtype=torch.bfloat16), "b": torch.full((4,), -value)}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    (folder / "run.json").write_text("{}", encoding="utf-8")
    return folder


def test_soup_is_the_weighted_mean_of_the_weights(tmp_path: Path) -> None:
    sources = [write_policy(tmp_path / str(i), float(i)) for i in (1, 2, 4)]
    (tmp_path / "soup").mkdir()
    average_policies(sources, (0.5, 0.25, 0.25), tmp_path / "soup")
    mean = load_file(tmp_path / "soup" / "adapter_model.safetensors")
    assert mean["a.weight"].dtype == torch.float32 and mean["a.weight"].tolist() == [[2.0] * 3] * 2
    assert mean["b"].dtype == torch.float32 and mean["b"].tolist() == [-2.0] * 4
    assert {p.name for p in (tmp_path / "soup").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }


@pytest.mark.parametrize("files", [("adapter_model",), ("model-00001-of-00002", "model-00002-of-00002")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soup_is_the_float64_mean_rounded_once_to_float32(
    tmp_path: Path, files: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Also of bfloat16 policies that differ by less than two such numbers lie apart, 1.2e-4 at .02."""
    generator, sources, weights = torch.Generator().manual_seed(1), [], (0.5, 0.3, 0.2)
    for i in range(3):
        sources.append(write_policy(tmp_path / str(i), 1.0))
        (sources[-1] / "adapter_model.safetensors").unlink()
        for file in files:
            moved = 0.02 + 2e-4 * torch.rand(20_000, generator=generator)
            save_file({"w": moved.to(dtype)}, sources[-1] / f"{file}.safetensors")
    (tmp_path / "soup").mkdir()
    average_policies(sources, weights, tmp_path / "soup")
    for file in files:
        held = [load_file(source / f"{file}.safetensors")["w"].double().numpy() for source in sources]
        found = load_file(tmp_path / "soup" / f"{file}.safetensors")["w"]
        wanted = (weights[0] * held[0] + weights[1] * held[1] + weights[2] * held[2]).astype(np.float32)
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), wanted)


def test_policies_of_another_kind_are_no_soup(tmp_path: Path) -> None:
    one, other = write_policy(tmp_path / "1", 1.0), write_policy(tmp_path / "2", 2.0, name="c.weight")
    with pytest.raises(DataError, match="does not hold the tensors of"):
        average_policies([one, other], (0.5, 0.5), tmp_path)
    (other / "adapter_model.safetensors").rename(other / "model.safetensors")
    with pytest.raises(DataError, match="train both with one tuning"):
        average_policies([one, other], (0.5, 0.5), tmp_path)

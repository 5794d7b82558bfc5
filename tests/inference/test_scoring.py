"""Scoring passes: right values, nothing computed twice, interruptions, batches that do not matter."""

import pytest
import torch
from model_families import VOCABULARY, causal_model, separate_logps

from prmd.errors import DataError
from prmd.inference import scoring
from prmd.inference.cache import ScoreTable, tokens_key
from prmd.inference.scoring import lookup, score_logps, score_rows
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow


def random_rows(n: int, *, seed: int = 0, responses: int = 2) -> list[PrefixRow]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (), generator=generator))
        return tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())

    return [PrefixRow(tokens(14), tuple(tokens(9) for _ in range(responses))) for _ in range(n)]


class Counting:
    """A stand-in for a model: the value of a response is the sum of its tokens, and every call is remembered."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.fail_at = fail_at

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        self.batches.append(batch)
        sums = torch.zeros(len(batch["last_index"]))
        return sums.index_add(0, batch["sequence_index"], batch["target_ids"].float())[:, None]

    @property
    def responses(self) -> int:
        return sum(len(batch["last_index"]) for batch in self.batches)


def run(rows, compute, directory, *, tokens_per_batch=40, share_prompt=True):
    return score_rows(
        rows,
        compute,
        table=ScoreTable(directory, 1),
        pad_id=0,
        tokens_per_batch=tokens_per_batch,
        share_prompt=share_prompt,
        device=torch.device("cpu"),
        description="test",
    )


def sums_of(rows):
    return [[[float(sum(response))] for response in row.responses] for row in rows]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_every_response_gets_its_own_value_in_the_order_of_the_rows(tmp_path, share_prompt):
    rows = random_rows(20, responses=3)
    found = run(rows, Counting(), tmp_path, share_prompt=share_prompt)
    assert [value.tolist() for value in found] == sums_of(rows)


def test_what_the_table_holds_is_not_computed_again(tmp_path):
    rows = random_rows(12)
    first, second, third = Counting(), Counting(), Counting()
    run(rows[:8], first, tmp_path)
    run(rows, second, tmp_path)
    assert (first.responses, second.responses) == (16, 8)
    assert [v.tolist() for v in run(rows, third, tmp_path)] == sums_of(rows)
    assert third.batches == []


def test_of_a_row_only_the_missing_responses_are_computed(tmp_path):
    run([PrefixRow((5, 6), ((7,), (8, 9)))], Counting(), tmp_path)
    counting = Counting()
    row = PrefixRow((5, 6), ((8, 9), (10,), (7,), (11, 12)))
    assert [v.tolist() for v in run([row], counting, tmp_path)] == sums_of([row])
    assert counting.responses == 2


def test_duplicates_are_computed_once(tmp_path):
    rows = random_rows(5)
    twice = [*rows, *rows, PrefixRow(rows[0].prompt_ids, rows[0].responses[:1] * 3)]
    counting = Counting()
    assert [v.tolist() for v in run(twice, counting, tmp_path)] == sums_of(twice)
    assert counting.responses == 10


def test_the_prompt_is_encoded_once_for_all_its_responses(tmp_path):
    row = PrefixRow(tuple(range(2, 32)), tuple((40 + i, 50) for i in range(6)))
    shared, apart = Counting(), Counting()
    run([row], shared, tmp_path / "a", tokens_per_batch=500)
    run([row], apart, tmp_path / "b", tokens_per_batch=500, share_prompt=False)
    assert [b["input_ids"].numel() for b in shared.batches] == [30 + 6 * 2]
    assert [b["input_ids"].numel() for b in apart.batches] == [6 * 32]


@pytest.mark.parametrize("seconds", [-1.0, 3600.0])
def test_an_interruption_keeps_what_was_computed_and_the_rest_follows(tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(scoring, "SHARD_SECONDS", seconds)
    rows = random_rows(16)
    torn, rest = Counting(fail_at=3), Counting()
    with pytest.raises(KeyboardInterrupt):
        run(rows, torn, tmp_path)
    kept = len(ScoreTable(tmp_path, 1))
    assert kept == torn.responses > 0
    assert [v.tolist() for v in run(rows, rest, tmp_path)] == sums_of(rows)
    assert rest.responses == 32 - kept


def test_what_a_lost_shard_held_is_computed_in_the_batches_of_before(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SHARD_SECONDS", -1.0)
    rows = random_rows(40)
    before = Counting()
    run(rows, before, tmp_path)
    shards = sorted(tmp_path.glob("shard-*"))
    assert len(shards) == len(before.batches) > 5
    lost = (0, 2, 3, len(shards) - 1)
    for i in lost:
        shards[i].unlink()
    again = Counting()
    run(rows, again, tmp_path)
    ours, theirs = ([b["input_ids"].tolist() for b in some] for some in (again.batches, before.batches))
    assert ours == [theirs[i] for i in lost]  # and so with the same rounding


def test_shards_wait_for_the_clock(tmp_path):
    run(random_rows(16), Counting(), tmp_path)
    assert len(list(tmp_path.glob("shard-*"))) == 1


def test_non_finite_scores_are_refused(tmp_path):
    with pytest.raises(DataError, match="not finite"):
        run(
            random_rows(3),
            lambda batch: torch.full((len(batch["last_index"]), 1), float("nan")),
            tmp_path,
        )
    assert len(ScoreTable(tmp_path, 1)) == 0


# ------------------------------------------------------------------ log-probabilities
def logps_of(model, rows, directory, tokens_per_batch):
    return score_logps(
        model,
        rows,
        table=ScoreTable(directory, 1),
        pad_id=0,
        tokens_per_batch=tokens_per_batch,
        description="test",
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logps_equal_separate_passes_whatever_the_batches(tmp_path, family):
    model, rows = causal_model(family), random_rows(14, responses=3)
    expected = separate_logps(model, rows).view(14, 3)
    found = {n: torch.stack(logps_of(model, rows, tmp_path / f"{n}", n)) for n in (1, 70, 100_000)}
    for values in found.values():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(values, found[1], rtol=1e-5, atol=1e-5)


def test_a_window_shorter_than_the_longest_conversation_is_scored_unshared(tmp_path):
    model, rows = causal_model("mistral", 4), random_rows(6, responses=3)
    found = torch.stack(logps_of(model, rows, tmp_path, 200))
    torch.testing.assert_close(found, separate_logps(model, rows).view(6, 3), rtol=1e-5, atol=1e-4)


def test_cached_logps_need_no_model(tmp_path):
    model, rows = causal_model("llama"), random_rows(4)
    first = logps_of(model, rows, tmp_path, 64)
    again = logps_of(None, rows, tmp_path, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(KeyError):
        logps_of(None, random_rows(1, seed=9), tmp_path, 64)


def test_precomputed_logps_equal_those_of_a_training_batch(tmp_path):
    model, rows = causal_model("qwen2"), random_rows(10)
    cached = torch.stack(logps_of(model, rows, tmp_path, 128))
    for start in range(0, 10, 3):  # other batches, with gradients, in training mode
        part = rows[start : start + 3]
        online = SequenceLogps(model.train())(**collate_rows(part, pad_id=0)).view(-1, 2)
        torch.testing.assert_close(cached[start : start + 3], online.detach(), rtol=1e-5, atol=1e-4)
    model.eval()


def test_lookup_is_by_prompt_and_response(tmp_path):
    table = ScoreTable(tmp_path, 2)
    keys = [tokens_key((1,), (2,)), tokens_key((1,), (3,))]
    table.append(keys, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert lookup(table, PrefixRow((1,), ((3,), (2,)))).tolist() == [[3.0, 4.0], [1.0, 2.0]]

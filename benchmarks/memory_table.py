"""Peak memory of one DPO training step by vocabulary and length, ours beside TRL's DPOTrainer.

    python benchmarks/memory_table.py [--json FILE] [--model FOLDER_OR_WHEEL] [--without-trl]

A model of two layers and hidden size 64, so that logits and not weights decide; one pair with half of its tokens in the
prompt. Bytes of live tensors are counted on the CPU (`training.rehearsal`), the same on every machine.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

from transformers import PreTrainedTokenizerBase

from benchmarks.side_by_side.memory import dpo_peaks
from benchmarks.side_by_side.setup import Workload, command_line, model_config, publish
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.loading import load_config
from prmd.config.shared import RewardModelConfig
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import tokenize_pairs
from prmd.pairs import make_pair
from prmd.runtime import configure_logging
from prmd.training.batches import MicroBatch
from utils import user_errors_exit

VOCABULARIES, LENGTHS = (49_152, 151_936), (256, 512, 1024)
Row = dict[str, int | None]


def one_pair(tokenizer: PreTrainedTokenizerBase, length: int) -> Workload:
    """A pair whose conversations have about `length` tokens each, half of them in the response."""
    words = length // 2 - 8  # the template takes the rest
    pair = make_pair(
        prompt=[{"role": "user", "content": "a" + " the" * words}],
        chosen="b" + " the" * words,
        rejected="c" + " the" * words,
        source="benchmark/1",
        objective="helpful",
    )
    rows = tokenize_pairs(
        [pair], tokenizer, max_length=2 * length, over_length="drop", keep_suffix=False
    ).rows
    return Workload(tokenizer, (pair,), tuple(rows), (), (MicroBatch((0,)),), "one pair of a repeated word")


def measure(tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int, *, trl: bool) -> Row:
    """Peak bytes of a step on either side; `states` are the weights, gradients and AdamW moments within them."""
    workload = one_pair(tokenizer, length)
    peaks = dpo_peaks(workload, vocabulary=vocabulary, max_length=2 * length, trl=trl)
    return {"vocabulary": vocabulary, "tokens": workload.policy_rows[0].longest, **asdict(peaks)}


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table in MiB."""
    lines = ["| vocabulary | tokens | ours | TRL | ours / TRL | of either, weights and AdamW |"]
    lines.append("|---:" * 6 + "|")
    for row in rows:
        other = row["trl"]
        trl = ("-", "-") if other is None else (f"{other / 2**20:,.0f} MiB", f"{row['ours'] / other:.2f}")
        cells = [f"{row['vocabulary']:,}", f"{row['tokens']:,}", f"{row['ours'] / 2**20:,.0f} MiB", *trl]
        lines.append("| " + " | ".join([*cells, f"{row['states'] / 2**20:,.0f} MiB"]) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the rows."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--without-trl", action="store_true", help="our side alone: seconds instead of minutes"
    )
    options = parser.parse_args(arguments)
    configure_logging()
    paths = load_config(CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig).paths
    tokenizer = load_tokenizer(model_config(options.model), paths)
    trl = not options.without_trl
    rows = [measure(tokenizer, v, length, trl=trl) for v in VOCABULARIES for length in LENGTHS]
    publish(rows, table(rows), options.json)


if __name__ == "__main__":
    with user_errors_exit():
        main()

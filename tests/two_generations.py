"""Two sampling passes into one table, started by `test_generation` once alone and once under torchrun.

    python tests/two_generations.py DIRECTORY MODEL

Every process writes `rank-<r>.json` (its batches and all samples) itself; a process beside the main one fails if anything
of the project tries to write a file.
"""

import sys
from pathlib import Path

from gloo_processes import only_the_main_process_writes, record_rank
from tiny_models import QUESTIONS
from transformers import AutoModelForCausalLM

from prmd.inference import generation
from prmd.inference.cache import JsonTable
from prmd.inference.generation import generate
from prmd.models.loading import load_tokenizer_from
from prmd.models.tokenization import tokenize_prompt
from prmd.runtime import start_processes


def main(directory: Path, model_folder: Path) -> None:
    start_processes()
    only_the_main_process_writes()
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
    record_rank(directory, {"samples": samples, "batches": batches})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

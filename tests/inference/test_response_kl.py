"""KL in blocks of logits against full softmaxes."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tiny_models import direct_kl, tiny_config
from transformers import LlamaForCausalLM

from prmd.inference.kl import response_kls
from prmd.models.prefix_rows import collate_rows
from prmd.models.tokenization import PrefixRow


@pytest.mark.parametrize("share_prompt", [True, False])
def test_response_kls_in_blocks_equal_the_full_softmax(
    share_prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.inference.kl.LOGITS_AT_ONCE", 1000)  # three positions of 300 logits at a time
    torch.manual_seed(0)
    policy, reference = (LlamaForCausalLM(tiny_config()).eval() for _ in range(2))
    rows = [PrefixRow((5, 6, 7), ((8, 9, 2), (10, 11, 12, 13, 2))), PrefixRow((20, 21), ((30,),))]
    with torch.inference_mode():
        found = response_kls(
            policy, lambda: nullcontext(reference), collate_rows(rows, pad_id=0, share_prompt=share_prompt)
        )
    wanted = [direct_kl(policy, reference, row.prompt_ids, r) for row in rows for r in row.responses]
    assert found.numpy() == pytest.approx(np.array(wanted), rel=1e-4)

"""`flex_attention` compiled on the card, forward and backward, beside sdpa; a CPU has no backward pass of it."""

import copy

import pytest
import torch
from model_families import family_config, gradients
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModelForCausalLM

from prmd.models.attention import SDPA_OR_FLEX, rows_mask
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow

pytestmark = pytest.mark.gpu

LONG_ROWS = [
    PrefixRow(tuple(range(2, 58)) * 3, (tuple(range(5, 50)) * 3, tuple(range(9, 60)) * 2)),
    PrefixRow((7, 8, 9), ((20, 21), (30, 31, 32), (33,))),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_logps_and_gradients_are_those_of_sdpa(family, dtype, tolerance):
    torch.manual_seed(7)
    config = family_config(family, head_dim=16, hidden_size=64)
    sdpa = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to("cuda", dtype)
    flex = copy.deepcopy(sdpa)
    flex.set_attn_implementation(SDPA_OR_FLEX)
    batch = {name: tensor.cuda() for name, tensor in collate_rows(LONG_ROWS, pad_id=0).items()}
    for model in (sdpa, flex):
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert isinstance(rows_mask(flex, batch["segment_ids"]), BlockMask)
    ours, expected = SequenceLogps(flex)(**batch), SequenceLogps(sdpa)(**batch)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    found, wanted = gradients(flex, ours.mean()), gradients(sdpa, expected.mean())
    norm = torch.stack([g.float().norm() for g in wanted.values()]).norm()
    difference = torch.stack([(found[k].float() - g.float()).norm() for k, g in wanted.items()]).norm()
    assert difference <= tolerance * norm


def test_autocast_trains_through_flex():
    config = family_config("qwen2", head_dim=16, hidden_size=64)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=SDPA_OR_FLEX).cuda().train()
    batch = {name: tensor.cuda() for name, tensor in collate_rows(LONG_ROWS, pad_id=0).items()}
    with torch.autocast("cuda", torch.bfloat16):
        loss = SequenceLogps(model)(**batch).mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

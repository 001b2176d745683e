"""Twenty QLoRA steps against peft + bitsandbytes: same start, same data, same order, fp32."""

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model

import qtune_companion as qt

STEPS, BATCH = 20, 2


def batches():
    collate = qt.CompletionCollator(qt.load_tokenizer())
    records = list(qt.to_prompts(qt.load_speeches("castle", "train").select(range(STEPS * BATCH))))
    return [collate(records[i : i + BATCH]) for i in range(0, len(records), BATCH)]


def losses(model):
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-4)
    found = []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def theirs():
    model = qt.load_model()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32,
                                    compress_statistics=True, quant_type="nf4")  # fmt: skip
            new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4",
                                           compress_statistics=True)  # fmt: skip
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new.to("cpu"))
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


@pytest.mark.slow
def test_same_loss_curve(tmp_path):
    peer = theirs()
    peer.save_pretrained(tmp_path)  # its random start is ours too
    ours = qt.load_model()
    qt.quantize_(ours, "nf4-dq")
    qt.load_adapter_(ours, tmp_path)
    mine, their = losses(ours), losses(peer)
    assert len(mine) == STEPS
    assert max(abs(a - b) for a, b in zip(mine, their, strict=True)) <= 1e-3
    assert min(mine) < mine[0] / 2, "nothing was learned"

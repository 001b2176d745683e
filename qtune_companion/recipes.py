"""The recipe: fine-tune a quantized LLM with LoRA by Hugging Face's ``Trainer`` (QLoRA, arXiv:2305.14314).

Chapters 13 and 15 walk through it; ``qtune finetune`` runs it.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from transformers import TrainerCallback, TrainingArguments, set_seed

from .checks import check_run, remember_run
from .dracula import MOVES, PROMPT, load_records, load_speeches, to_prompts
from .evaluation.next_move import context_length, label_ids, next_move_accuracy
from .finetuning.collators import CompletionCollator, completion_loss
from .finetuning.lora import add_lora_, save_adapter
from .finetuning.swiglu import lean_swiglu_
from .models import load_model, load_tokenizer
from .surgery import model_bytes, quantize_
from .trainer import AdapterTrainer, newest_checkpoint

__all__ = ["FinetuneConfig", "FinetuneResult", "best_compute_dtype", "finetune"]


def best_compute_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies its matrices faster, else float32.

    On a CPU that takes matrix tiles (AMX); bfloat16 vector instructions alone are slower than float32's.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.bfloat16 if probe is not None and probe() else torch.float32


@dataclass
class FinetuneConfig:
    """What to train on what; the defaults are the book's."""

    model: str = "smollm2-135m"  # an embedded name, a folder or a hub id
    data: str | None = None  # JSON lines with speech and move; None: the castle speeches
    train_on: tuple[str, ...] = ("train", "extra")  # splits
    output: str = "adapter"  # folder of the adapter; checkpoints go to <output>/checkpoints
    scheme: str | None = "nf4-dq"  # how the frozen base is quantized; None leaves it dense
    compute: str = "auto"  # "bf16", "fp32", or "auto": bf16 where the hardware multiplies it faster
    rank: int = 16  # inner dimension of the adapter
    alpha: float = 32.0  # its scale: alpha / rank
    dropout: float = 0.0  # on the adapter's input
    epochs: int = 1  # passes over the training data
    batch_size: int = 8  # speeches a step
    lr: float = 7e-4  # peak learning rate; one warm-up, then cosine
    warmup: float = 0.1  # share of the steps
    prompt_weight: float = 1.0  # of the prompt's language-model loss beside the completion's; 0: none
    prompt_every: int = 8  # one in so many prompt tokens counts for it
    among: float = 0.5  # share of the completion's loss that compares the moves with one another alone
    average: float = 0.4  # the adapter is its mean over this last share of the steps; 0: the last step's
    weight_decay: float = 0.01  # on the adapter's matrices
    max_length: int = 512  # tokens; longer prompts lose their beginning
    save_steps: int = 30  # a checkpoint every so many steps
    max_steps: int = -1  # stop after so many steps; -1: all epochs
    seed: int = 0
    resume: bool = False  # go on from the newest whole checkpoint
    progress: bool = True  # progress bars
    prompt: str = PROMPT
    moves: tuple[str, ...] = MOVES  # the answers there are


@dataclass
class FinetuneResult:
    """What :func:`finetune` found."""

    adapter: Path
    accuracy_before: float
    accuracy_after: float
    losses: list[float]  # one a step
    ledger: dict[str, int] = field(repr=False)  # bytes; see surgery.model_bytes
    bits_per_weight: float | None  # of the quantized layers
    seconds: float
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)


def _splits(config: FinetuneConfig) -> tuple[Dataset, Dataset]:
    """Training and test records with prompt and completion."""
    if config.data is None:
        further = [load_speeches("castle", split) for split in ("extra", "families")]
        rows = concatenate_datasets([load_speeches("castle"), *further])
    else:
        rows = load_records(config.data, config.moves)
    if not any(rows["split"]):
        order = list(range(len(rows)))
        random.Random(0).shuffle(order)
        test = set(order[: max(1, len(rows) // 5)])
        rows = rows.remove_columns("split").add_column(
            "split", ["test" if i in test else "train" for i in range(len(rows))]
        )
    prompts = to_prompts(rows, config.prompt)
    parts = []
    for names in (config.train_on, ("test",)):
        keep = [i for i, split in enumerate(rows["split"]) if split in names]
        if not keep and len(rows) < 2:
            raise ValueError(
                f"{config.data} holds one record: one to learn from and one to test are the least"
            )
        if not keep:
            raise ValueError(f"{config.data} has no records for the split {' or '.join(names)}")
        parts.append(prompts.select(keep))
    return parts[0], parts[1]


def prepare(config: FinetuneConfig) -> tuple[Any, Any, float | None]:
    """Load, quantize and add LoRA: model, tokenizer, stored bits a weight."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": best_compute_dtype()}
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    if tokenizer.mask_token_id is not None:
        raise ValueError(
            f"{config.model} is an encoder: this recipe trains causal LLMs (chapter 15 trains encoders)"
        )
    label_ids(tokenizer, [f" {move}" for move in config.moves])
    if config.rank > (width := model.get_input_embeddings().weight.shape[1]):
        raise ValueError(f"rank must be at most {width}, the width of {config.model}, got {config.rank}")
    bits = None
    if config.scheme is not None:
        bits = quantize_(model, config.scheme, compute_dtype=dtypes[config.compute]).bits_per_weight
    lean_swiglu_(model)
    # A slice of the hidden states is not contiguous, and torch would read the large output matrix once a row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    set_seed(config.seed)
    add_lora_(model, config.rank, config.alpha, dropout=config.dropout)
    return model.to("cuda") if torch.cuda.is_available() else model, tokenizer, bits


def training_arguments(config: FinetuneConfig, output: Path, steps: int) -> TrainingArguments:
    """The recipe in ``Trainer``'s words."""
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(config.warmup * steps)),
        weight_decay=config.weight_decay,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not config.progress,
        label_names=["labels"],
    )


def finetune(config: FinetuneConfig, callbacks: Sequence[TrainerCallback] = ()) -> FinetuneResult:
    """Fine-tune LoRA over a quantized, frozen base; measure before and after; save the adapter.

    Parameters
    ----------
    config : FinetuneConfig
    callbacks : sequence of TrainerCallback
        Passed to ``Trainer``.

    Returns
    -------
    FinetuneResult

    Raises
    ------
    ValueError, FileNotFoundError
        On bad values, before anything is trained or written over; after a training that ran away to NaN.
    """
    start = time.perf_counter()
    output = check_run(config)
    train, test = _splits(config)
    model, tokenizer, bits = prepare(config)
    remember_run(config, output)
    labels = [f" {move}" for move in config.moves]
    bar = _bar if config.progress else None
    room = context_length(model, tokenizer, config.max_length)
    before = next_move_accuracy(
        model, tokenizer, test, labels, progress=bar and bar("Before"), max_length=room
    )
    train = train.add_column("length", [len(ids) for ids in tokenizer(list(train["prompt"])).input_ids])
    steps = config.epochs * -(-len(train) // config.batch_size)
    steps = steps if config.max_steps == -1 else config.max_steps
    trainer = AdapterTrainer(
        model=model,
        args=training_arguments(config, output, steps),
        train_dataset=train,
        data_collator=CompletionCollator(tokenizer, room, prompt_every=config.prompt_every),
        compute_loss_func=functools.partial(
            completion_loss,
            prompt_weight=config.prompt_weight,
            answers=label_ids(tokenizer, labels),
            among=config.among,
        ),
        callbacks=list(callbacks),
        average=config.average,
    )
    checkpoint = newest_checkpoint(output / "checkpoints") if config.resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise ValueError(f"the training ran away to NaN or inf; no adapter was saved. Lower lr ({config.lr})")
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    after = next_move_accuracy(model, tokenizer, test, labels, progress=bar and bar("After"), max_length=room)
    save_adapter(model, output, base_model=config.model, task_type="CAUSAL_LM")
    seconds = time.perf_counter() - start
    return FinetuneResult(output, before, after, losses, model_bytes(model), bits, seconds, model, tokenizer)


def _bar(description: str) -> Any:
    """A progress bar for :func:`next_move_accuracy`."""
    from tqdm.auto import tqdm

    return lambda batches: tqdm(batches, desc=f"{description} training", leave=False)

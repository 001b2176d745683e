"""The command line: ``qtune finetune`` and ``qtune evaluate``, for the book's data or a reader's own."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"qtune: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qtune",
        description="Quantize an LLM, fine-tune it with LoRA, measure it. On a laptop's CPU, or a GPU.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    tune = commands.add_parser(
        "finetune",
        help="fine-tune a quantized LLM on speeches and moves",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    tune.add_argument("--model", default="smollm2-135m", help="embedded name, folder or hub id")
    tune.add_argument(
        "--data",
        help='JSON lines {"speech": ..., "move": ..., "split": train|validation|test|... (optional)}',
    )
    tune.add_argument(
        "--train-on",
        default="train+extra",
        help="splits to learn: train, validation, extra, families, joined by +",
    )
    tune.add_argument("--output", default="adapter", help="folder for the adapter, in PEFT's format")
    tune.add_argument(
        "--scheme", default="nf4-dq", choices=["nf4", "nf4-dq", "int8", "int4", "none"], help="base"
    )
    tune.add_argument(
        "--compute", default="auto", choices=["auto", "bf16", "fp32"], help="precision of products"
    )
    tune.add_argument("--rank", type=int, default=16, help="LoRA's rank")
    tune.add_argument("--alpha", type=float, default=32.0, help="LoRA's scale is alpha / rank")
    tune.add_argument("--dropout", type=float, default=0.0, help="LoRA's dropout")
    tune.add_argument("--epochs", type=int, default=1, help="passes over the training data")
    tune.add_argument("--batch-size", type=int, default=8, help="records a step")
    tune.add_argument("--lr", type=float, default=7e-4, help="peak learning rate")
    tune.add_argument(
        "--prompt-weight", type=float, default=1.0, help="weight of the prompt's language-model loss; 0: none"
    )
    tune.add_argument(
        "--average", type=float, default=0.4, help="mean of the adapter over this last share of the steps"
    )
    tune.add_argument(
        "--max-length", type=int, default=512, help="tokens; longer prompts lose their beginning"
    )
    tune.add_argument("--save-steps", type=int, default=30, help="steps between checkpoints")
    tune.add_argument("--seed", type=int, default=0, help="of the adapter, the order and the dropout")
    tune.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    tune.add_argument("--moves", help="comma-separated answers, each one token; default: the Count's eight")
    check = commands.add_parser(
        "evaluate",
        help="next-move accuracy of a model, with or without an adapter",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    check.add_argument("--model", default="smollm2-135m", help="embedded name, folder or hub id")
    check.add_argument("--adapter", help="folder of an adapter in PEFT's format")
    check.add_argument(
        "--scheme", default="none", choices=["nf4", "nf4-dq", "int8", "int4", "none"], help="base"
    )
    check.add_argument(
        "--split",
        default="test",
        help="of the castle speeches (test, fresh, validation ...), or of your data where it names splits",
    )
    check.add_argument("--data", help="your own JSON lines instead")
    check.add_argument("--moves", help="comma-separated answers, each one token; default: the Count's eight")
    return parser


def _moves(args: argparse.Namespace) -> tuple[str, ...]:
    """The answers that the reader named."""
    return tuple(m.strip() for m in args.moves.split(",")) if args.moves else ()


def _finetune(args: argparse.Namespace) -> None:
    from .dracula import MOVES
    from .recipes import FinetuneConfig, finetune

    fields = {f.name for f in dataclasses.fields(FinetuneConfig)}
    values = {k: v for k, v in vars(args).items() if k in fields}
    values["scheme"] = None if args.scheme == "none" else args.scheme
    values["train_on"] = tuple(args.train_on.split("+"))
    values["moves"] = _moves(args) or MOVES
    result = finetune(FinetuneConfig(**values))
    ledger = result.ledger
    print("\nMemory ledger (MiB)")
    rows = {
        "base, quantized": ledger["quantized"],
        "base, dense (embeddings, norms)": ledger["frozen"],
        "adapter": ledger["trainable"],
        "gradients": ledger["gradients"],
        "Adam's moments": ledger["adam"],
    }
    for name, size in [*rows.items(), ("total without activations", sum(rows.values()))]:
        print(f"  {name:32} {size / 2**20:8.1f}")
    if result.bits_per_weight is not None:
        print(f"  stored bits a quantized weight   {result.bits_per_weight:8.3f}")
    if peak := _peak_bytes():
        print(f"  peak of the process              {peak / 2**20:8.1f}")
    print(
        f"\nAccuracy before {result.accuracy_before:.1%}, after {result.accuracy_after:.1%}; {result.seconds:.0f} s"
    )
    print(f"Adapter: {result.adapter}  (peft: PeftModel.from_pretrained(base, {str(result.adapter)!r}))")


def _evaluate(args: argparse.Namespace) -> None:
    from tqdm.auto import tqdm

    from .dracula import MOVES, load_records, load_speeches, to_prompts
    from .evaluation.next_move import next_move_accuracy
    from .finetuning.lora import load_adapter_
    from .models import load_model, load_tokenizer
    from .surgery import quantize_

    moves = _moves(args) or MOVES
    rows = load_records(args.data, moves) if args.data else load_speeches("castle", args.split)
    if args.data and any(rows["split"]):
        rows = rows.select([i for i, split in enumerate(rows["split"]) if split == args.split])
        if not len(rows):
            raise ValueError(
                f"{args.data} has no records for the split {args.split}: name another by --split"
            )
    model, tokenizer = load_model(args.model), load_tokenizer(args.model)
    if args.scheme != "none":
        print(quantize_(model, args.scheme))
    if args.adapter:
        load_adapter_(model, args.adapter)
    accuracy = next_move_accuracy(model, tokenizer, to_prompts(rows), [f" {m}" for m in moves], progress=tqdm)
    print(f"Accuracy {accuracy:.1%} on {len(rows)} records")


def _peak_bytes() -> int | None:
    """The process' peak resident memory, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 on bad input, 130 when interrupted."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from .models import available_models

        if args.model in available_models() or Path(args.model).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no network unless a hub id is named
        {"finetune": _finetune, "evaluate": _evaluate}[args.command](args)
    except (ValueError, TypeError, OSError) as error:
        print(f"qtune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"qtune: interrupted{'; go on with --resume' * (args.command == 'finetune')}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

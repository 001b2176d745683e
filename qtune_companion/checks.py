"""What the recipe refuses before it works: bad values, a folder that is taken, a run that is not the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .trainer import newest_checkpoint

if TYPE_CHECKING:
    from .recipes import FinetuneConfig

__all__ = ["check_run", "remember_run"]


def check_run(config: FinetuneConfig) -> Path:
    """Refuse bad values before any work is done; return the output folder, made and writable."""
    for name in ("rank", "epochs", "batch_size", "save_steps", "max_length", "prompt_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    for name in ("average", "among", "warmup"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be a share, 0 to 1, got {getattr(config, name)}")
    for name in ("prompt_weight", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {getattr(config, name)}")
    for name in ("lr", "alpha"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
    for name in ("epochs", "batch_size", "save_steps", "prompt_weight", "weight_decay", "alpha"):
        if getattr(config, name) > 1_000_000:
            raise ValueError(f"{name} must be at most 1,000,000, got {getattr(config, name)}")
    if config.max_steps < 1 and config.max_steps != -1:
        raise ValueError(f"max_steps must be at least 1, or -1 for all epochs, got {config.max_steps}")
    if len(config.moves) < 2 or not all(config.moves):
        raise ValueError(f"moves must be two or more, none of them empty, got {', '.join(config.moves)!r}")
    if config.compute == "bf16" and config.scheme is None:
        raise ValueError("compute bf16 needs a quantized base: choose a scheme, or fp32")
    if not config.output:
        raise ValueError("output is empty: name a folder")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed must be 0 to {2**32 - 1}, got {config.seed}")
    if not config.train_on or set(config.train_on) - {"train", "validation", "extra", "families"}:
        raise ValueError(
            "train_on must name train, validation, extra, families or several, got "
            f"{'+'.join(config.train_on)!r}"
        )
    if config.compute not in ("auto", "bf16", "fp32"):
        raise ValueError(f"compute must be auto, bf16 or fp32, got {config.compute!r}")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file: name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output {output} is not writable ({error.strerror})") from error
    checkpoint = newest_checkpoint(output / "checkpoints")
    if checkpoint and not config.resume:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        if state["global_step"] >= state["max_steps"]:
            raise ValueError(f"{output} holds a finished run ({checkpoint.name}): name another folder")
        raise ValueError(
            f"{output} holds an unfinished run ({checkpoint.name}): resume it, or name another folder"
        )
    if not checkpoint and (output / "adapter_model.safetensors").exists():
        raise ValueError(f"{output} holds an adapter: name another folder")
    return output


def remember_run(config: FinetuneConfig, output: Path) -> None:
    """Write the run's settings; refuse to resume with others, which would not be the same run."""
    path = output / "run.json"
    mine = {k: v for k, v in asdict(config).items() if k not in ("resume", "progress", "output", "max_steps")}
    if config.data is not None:
        mine["data_sha256"] = hashlib.sha256(Path(config.data).read_bytes()).hexdigest()
    mine = json.loads(json.dumps(mine))
    if config.resume and path.is_file():
        try:
            theirs = json.loads(path.read_text())
            theirs.keys()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"cannot resume {output}: {path} is broken ({error})") from error
        changed = [k for k in mine if theirs.get(k) != mine[k]]
        if changed:
            raise ValueError(
                f"cannot resume {output}: {', '.join(f'{k} was {theirs.get(k)!r}, now {mine[k]!r}' for k in changed)}"
            )
    aside = path.with_name(f".run.{os.getpid()}")
    aside.write_text(json.dumps(mine, indent=2) + "\n")
    aside.replace(path)

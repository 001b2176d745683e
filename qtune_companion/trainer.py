"""``Trainer`` for adapters: small checkpoints, weight averaging, and finding the newest whole checkpoint.

Chapter 15 walks through it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_pt_utils import DistributedLengthGroupedSampler

from .finetuning.averaging import WeightAverage
from .finetuning.lora import load_adapter_, save_adapter

__all__ = ["AdapterTrainer", "QuietBar", "newest_checkpoint"]

_AVERAGE = "average.safetensors"
_CHECKPOINT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
)


class _Averaging(TrainerCallback):
    """Takes the weights of the last steps into a mean."""

    def __init__(self, average: WeightAverage, share: float) -> None:
        self.average, self.share = average, share

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step > (1 - self.share) * state.max_steps:
            self.average.update(model)


class QuietBar(ProgressCallback):
    """A progress bar with the step's loss beside it, and no line a step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the loss beside the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")


class AdapterTrainer(Trainer):
    """``Trainer`` whose checkpoints hold the adapter alone: the frozen base is loaded anew.

    With ``average`` above 0, training ends at the adapter's mean over that last share of the steps.
    """

    def __init__(self, *args: Any, average: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for talkative in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):
            self.remove_callback(talkative)
        if not self.args.disable_tqdm:
            self.add_callback(QuietBar)
        self.average = WeightAverage()
        self.add_callback(_Averaging(self.average, average))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then move the model to the mean."""
        result = super().train(*args, **kwargs)
        if self.average.count:
            self.average.copy_to_(self.model)
        return result

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Draw the order from seed and epoch alone: a run that resumes in a later epoch must see the same."""
        data = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        return DistributedLengthGroupedSampler(
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            num_replicas=1,  # accelerate deals the batches out to the processes
            rank=0,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            lengths=list(data[self.args.length_column_name]),
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = save_adapter(self.model, output_dir or self.args.output_dir, task_type="CAUSAL_LM")
        if self.average.count:
            self.average.save(folder / _AVERAGE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_(model or self.model, resume_from_checkpoint)
        if (saved := Path(resume_from_checkpoint) / _AVERAGE).is_file():
            self.average.load(saved, self.args.device)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a run that was killed may leave a broken one behind."""
    steps = {int(p.name[11:]): p for p in folder.glob("checkpoint-*") if p.name[11:].isdecimal()}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):  # written last
            continue
        whole = isinstance(state, dict) and {"global_step", "max_steps"} <= state.keys()
        whole = whole and any(path.glob("rng_state*.pth"))  # one a process
        if whole and all((path / name).is_file() for name in _CHECKPOINT_FILES):
            return path
    return None

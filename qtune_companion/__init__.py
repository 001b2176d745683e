"""Companion package of the book *Fine-Tuning Quantized LLMs in PyTorch: a Dracula story*.

``import qtune_companion as qt`` gives the names that the chapters use. Each is imported when it is first
asked for, so that ``qt.quantize_nf4`` does not load transformers. Any file of ``quantization``,
``finetuning`` and ``evaluation`` can be copied alone into another project.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "quantization.affine": [
        "AffineGrid", "AffineParams", "AffineTensor", "choose_qparams", "dequantize_affine", "fake_quantize",
        "quantize_affine",
    ],
    "quantization.awq": ["awq_clip", "awq_scales"],
    "quantization.calibration": ["collect_absmax", "collect_hessians", "collect_inputs"],
    "quantization.codebook": [
        "FP4", "NF4", "CodebookGrid", "CodebookTensor", "DoubleQuantized", "NF4Tensor", "dynamic_map",
        "lloyd_max", "quantize_nf4",
    ],
    "quantization.formats": [
        "BF16", "FP16", "FP32", "FP4_E2M1", "FP8_E4M3", "FP8_E5M2", "INT4", "INT8", "MXFP4", "MXFP8",
        "MXFP8_E5M2", "NVFP4", "TERNARY", "TF32", "BlockFormat", "BlockTensor", "FloatFormat", "IntFormat",
    ],
    "quantization.gguf_blocks": ["GGUF_BLOCKS", "GGUFTensor", "dequantize_gguf"],
    "quantization.gptq": ["gptq"],
    "quantization.hqq": ["HQQTensor", "hqq"],
    "quantization.kv_cache": ["QuantizedCache", "decode_blocks", "encode_blocks"],
    "quantization.packing": ["pack_bits", "unpack_bits"],
    "quantization.ranges": ["choose_range"],
    "quantization.rotation": ["HadamardTransform", "hadamard", "rotate_"],
    "quantization.smoothquant": ["fold_scales_", "smooth_scales"],
    "finetuning.averaging": ["WeightAverage"],
    "finetuning.quantized_linear": ["QuantizedLinear"],
    "finetuning.swiglu": ["GatedMLP", "lean_swiglu_"],
    "finetuning.lora": ["LoRALinear", "add_lora_", "load_adapter_", "merge_lora_", "save_adapter"],
    "finetuning.collators": ["ClozeCollator", "CompletionCollator", "completion_loss"],
    "evaluation.divergence": ["Divergence", "block_bootstrap", "compare", "kl_divergence", "log_probs"],
    "evaluation.next_move": ["next_move_accuracy", "next_move_scores"],
    "evaluation.perplexity": ["perplexity", "token_losses"],
    "evaluation.scoreboard": ["Row", "add_row", "pareto", "read_rows", "table"],
    "dracula": ["FEINT", "MOVES", "PROMPT", "load_journal", "load_records", "load_speeches", "to_prompts"],
    "models": ["available_models", "load_model", "load_tokenizer"],
    "surgery": ["QuantizationReport", "model_bytes", "quantize_"],
    "recipes": ["FinetuneConfig", "FinetuneResult", "best_compute_dtype", "finetune"],
    "trainer": ["AdapterTrainer", "newest_checkpoint"],
    "plots": ["COLORS", "SliderFigure", "plot_confusion", "plot_ledger", "use_style"],
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qtune_companion' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

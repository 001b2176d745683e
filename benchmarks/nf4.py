"""Decoding NF4: ours (plain PyTorch) beside bitsandbytes' native CPU kernel, in one run."""

import time
from statistics import median

import bitsandbytes.functional as bnb
import torch

from qtune_companion.quantization.codebook import quantize_nf4


def seconds(call, repeats=30):
    for _ in range(5):
        call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return median(found)


def main():
    print("shape         ours ns/weight   bitsandbytes   ratio")
    for shape in ((576, 576), (1536, 576), (4096, 4096)):
        w = torch.randn(shape)
        ours = quantize_nf4(w)
        packed, state = bnb.quantize_4bit(w, quant_type="nf4")
        a, b = seconds(ours.dequantize), seconds(lambda p=packed, s=state: bnb.dequantize_4bit(p, s))
        print(f"{shape!s:14}{a / w.numel() * 1e9:14.2f}{b / w.numel() * 1e9:15.2f}{a / b:8.2f}")

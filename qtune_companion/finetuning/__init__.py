"""Fine-tuning: quantized linear layer, LoRA, collators, weight averaging, lean SwiGLU. Each file can be copied alone."""

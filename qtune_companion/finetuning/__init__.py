"""Fine-tuning: quantized linear layer, LoRA, collators. Each file can be copied alone."""

"""Evaluation: perplexity and next-move accuracy. Each file can be copied alone."""

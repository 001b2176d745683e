"""Evaluation: perplexity, KL divergence, next-move accuracy, and the scoreboard. Each file can be copied alone."""

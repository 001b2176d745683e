"""Quantizers, formats and what prepares a model for them. Each file can be copied alone."""

"""Inference: cached decoding of batches, sampling, tools."""

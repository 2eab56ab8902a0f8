"""Checkpoints: safetensors files, mapped and strictly checked; pickled ones on request; dicts of arrays in memory."""

"""Hugging Face checkpoint in, TensorRT plan out, with 4-bit AWQ weights."""

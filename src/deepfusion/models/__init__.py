"""Checkpoints on disk and in memory: presets, loading, streaming tensors, adapters. Knows no text and no training."""

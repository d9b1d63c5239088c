"""DeepFusion: fuse fine-tuned small language models of many devices into one Mixture-of-Experts model."""

__version__ = "0.1.0"

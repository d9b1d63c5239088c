"""What DeepFusion is compared with; the core never imports it."""

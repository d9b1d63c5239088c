"""What is ours in learning: alignment, losses, View-Aligned Attention, distillation, training, measures."""

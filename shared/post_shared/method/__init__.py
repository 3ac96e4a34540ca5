"""THE PAPER, in its order: losses, distillation, tuning, transfer, audit."""

"""The paper's method, in its order: losses, distillation, tuning, transfer, audit."""

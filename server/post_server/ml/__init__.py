"""The provider's mathematics: distillation and transfer. Torch lives here and in the predictor only."""

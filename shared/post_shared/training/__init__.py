"""The training loop, with its optimizer, schedule, checkpoints and process group."""

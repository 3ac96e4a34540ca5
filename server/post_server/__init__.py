"""The provider's side of POST: API, jobs, workers, distillation, transfer and serving."""

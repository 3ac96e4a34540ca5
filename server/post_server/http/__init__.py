"""What all endpoints share: dependencies, errors, pagination, idempotency."""

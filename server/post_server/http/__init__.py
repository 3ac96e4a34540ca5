"""Shared by all endpoints: dependencies, errors, pagination, idempotency."""

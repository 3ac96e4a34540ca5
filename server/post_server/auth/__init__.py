"""API keys, rate limits, the audit log."""

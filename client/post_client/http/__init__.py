"""The client's HTTP layer."""

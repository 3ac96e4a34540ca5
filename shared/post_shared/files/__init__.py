"""Files from untrusted parties: bytes are checked here before they become tensors."""

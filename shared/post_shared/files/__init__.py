"""Files that strangers send: bytes are checked here before they become tensors."""

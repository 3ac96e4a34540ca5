"""How the client talks to the server."""

"""The data owner's side of POST: everything that reads private data lives here."""

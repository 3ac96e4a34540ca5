"""Students: download, integrity and safety checks."""

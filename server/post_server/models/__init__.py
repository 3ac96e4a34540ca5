"""``/v1/models``"""

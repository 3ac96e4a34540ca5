"""``/v1/datasets`` and uploads"""

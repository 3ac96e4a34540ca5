"""``/v1/reports``"""

"""``/v1/transfers``"""

"""``/v1/evaluations``"""

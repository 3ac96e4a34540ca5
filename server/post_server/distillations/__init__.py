"""``/v1/distillations``"""

"""``/v1/prompts``"""

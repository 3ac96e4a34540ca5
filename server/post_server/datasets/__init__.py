"""``/v1/datasets`` and ``/v1/uploads``"""

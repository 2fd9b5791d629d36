"""The method: windows, noise, codec, model and sampler. It uses the interface in `t2i.models.base`
and never names a model family.
"""

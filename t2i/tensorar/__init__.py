"""The method: windows, noise, codec, model and sampler. It knows `t2i.models.base` and no model
by name.
"""

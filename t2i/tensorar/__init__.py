"""The method: windows, noise, codec, model and sampler. It knows `t2i.backbones.base` and no model
by name.
"""

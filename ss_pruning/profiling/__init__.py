"""What a model costs: multiply-accumulates, latency, and the latency of each layer as a function of its width.

`macs` counts, `latency` times models side by side, `comparison` does so in several settings, `layer_latency` keeps a
table of layers. Files of other runtimes are called like models (`exported_model`; `runtimes` says which runtime takes
which file).
"""

"""How much a channel matters: synaptic strength, activation statistics, relevance, and layer sensitivity.

`strength` has the formulas, `synaptic` sums them up for channels, `scoring` asks any importance, Torch-Pruning's
included. `sensitivity` makes layers comparable: it runs copies that miss channels (`batched_ablation`) on
`calibration` inputs.
"""

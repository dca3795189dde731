"""The label probe, from labels to who feeds whom.

`recorder` runs a model with every layer cut loose, in `modes` that let labels pass; `vjp_probe` pulls labels back from
where something arrives, `channel_labels` makes and reads them, `heads` finds those of attention.
"""

"""The mathematics of pessimism: tensors in, tensors out; no configuration, file, model or log.

Read `aggregation` first (R(x, y) of K x M rewards), then `losses` (from R to a loss per pair).
"""

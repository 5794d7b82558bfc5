"""Models without gradients: cached scores, sampling, KL, the reference and the candidates of the evaluation."""

"""Language models: loading, messages to tokens, prefix-shared rows, attention over them, what a model says of a batch."""

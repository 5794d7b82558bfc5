"""The one trainer: its batches, memory, precision, checkpoints, and one training from start to published."""

"""Stage 2: reward models with their ensembles, trained, measured, calibrated, loaded."""

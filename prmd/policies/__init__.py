"""Stage 3: the frozen numbers of the reward models distilled into policies.

Read `methods` (what each method is), `targets` (what it is trained towards), then `train` (the stage).
"""

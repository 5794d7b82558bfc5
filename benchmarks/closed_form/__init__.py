"""Reward models without training: linear Bradley-Terry on frozen features, families of members, what their optimum reaches."""

"""Where artifacts lie, how their bytes reach the disk, and when one counts as finished."""

"""The report: files of `outputs/` in, one page, its tables and its figures out. Nothing is computed here; numbers are read."""

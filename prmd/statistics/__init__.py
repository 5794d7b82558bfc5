"""The statistics of the evaluation: outcomes, intervals, paired tests, reliability of margins, one seed for resampling."""

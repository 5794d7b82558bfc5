"""Every key of the three YAML files with its default, in the order of the files, and how they are read."""

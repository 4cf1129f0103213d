"""The models and data sets of project_name, which the configs in conf/ name."""

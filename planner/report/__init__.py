"""Plan -> something to look at. Formatting only: every number shown stands in `Plan.to_dict()`."""

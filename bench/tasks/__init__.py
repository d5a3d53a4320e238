"""Tasks: labelled examples, their splits, and how they are scored."""

"""The comparison: tasks, the one training loop, meters, records, statistics, reports."""

"""Data sets: where they come from, what their tables say, the splits, and the decoded images."""

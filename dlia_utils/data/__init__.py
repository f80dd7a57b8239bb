"""Data sets: where they come from, what their tables say, who is in which split, and the decoded images."""

"""What makes the repository: the notebooks, what Kaggle takes, the published tables. Not part of
the wheel."""

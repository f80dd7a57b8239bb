"""dlia_utils: the thin helper library behind the notebooks (data, models, training, attacks,
metrics)."""

__version__ = "0.1.0"

"""For scripts: parsing, datasets, models, training and comparing."""

from .script import *  # noqa: F403

"""Errors on the user's side. The command line prints them as one readable message, without a traceback."""


class UdasError(Exception):
    """Something the user can mend; the message names the file, key or picture and says what to do."""


class ConfigError(UdasError):
    """A configuration that cannot be used; the message lists every problem found."""


class DataError(UdasError):
    """A picture, label or list that is missing, broken or does not fit the configuration."""


class WeightsError(UdasError):
    """Weights that cannot be had, are of an unsafe format, or do not fit the network."""


class RunError(UdasError):
    """A run that has to stop: non-finite loss, full disk, unusable device, foreign checkpoint."""

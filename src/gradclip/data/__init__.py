"""Real data, checked against recorded hashes before it is used."""


class DataError(Exception):
    """A data file is missing, or is not the file it should be."""

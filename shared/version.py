"""Which version of the product this is."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("afterimage")
except PackageNotFoundError:  # run from a folder that is not installed
    VERSION = "0+unknown"

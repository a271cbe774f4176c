"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("afterimage")
except PackageNotFoundError:  # the package is not installed
    VERSION = "0+unknown"

"""The whole experiment as one frozen, validated object: its fields, how it is read, what a wrong
key is told.
"""

from harness.config.load import shipped
from harness.config.schema import Config

__all__ = ["Config", "shipped"]

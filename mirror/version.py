"""The version, alone in a module that nothing has to be imported for."""

__version__ = "0.1.0"

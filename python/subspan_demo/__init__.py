"""The demonstration job behind ``python -m subspan demo``."""

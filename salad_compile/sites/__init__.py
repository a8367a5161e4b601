"""A converted attention module: its record, parameters, hooks and uncompiled way."""

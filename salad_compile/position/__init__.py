"""Telling the position encoding from the rest of a forward, and running it again."""

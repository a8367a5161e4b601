"""The video's token grid: how it is found, and the orders of its tokens."""

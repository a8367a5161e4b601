"""Graph passes: one concern per file, run in the order that `driver.PASSES` lists."""

"""Graph passes: one file each, run in the order of `driver.PASSES`."""

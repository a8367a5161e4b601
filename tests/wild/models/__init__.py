"""One file for each foreign package: for each of its video DiT classes a tiny configuration and inputs."""

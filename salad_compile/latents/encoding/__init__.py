"""From a folder of videos with captions to precomputed data: found, decoded, cut to size, encoded by a pipeline."""

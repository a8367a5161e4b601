"""One forward that shows a model's attention calls, and what is known of each afterwards."""

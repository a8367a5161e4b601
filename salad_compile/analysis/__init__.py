"""Looking at a converted model: what it computes, what it costs, and what to change by measurement."""

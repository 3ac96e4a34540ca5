"""Jobs: what a job row may become, who may change it, and how a worker hears of it."""

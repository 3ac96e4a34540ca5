"""Jobs: the states of a job row, who may change them, and how workers are notified."""

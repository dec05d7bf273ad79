"""One file a claim: what is measured, against which peers, and the bar that it must pass."""

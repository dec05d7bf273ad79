"""The name on which a mount's server and a store agree for a switch of layers that has begun."""

MARK = "cowfs-begun"
"""File in a new layer's directory: from now on the layer may be written to."""

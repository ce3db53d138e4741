"""Which operation of a forward pass uses which parameter."""

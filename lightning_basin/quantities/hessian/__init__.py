"""Null spaces of the Hessian of the loss."""

"""Behavioral gradients of each layer."""

"""The callbacks: all that knows Lightning."""

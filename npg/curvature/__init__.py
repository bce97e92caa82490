"""Structured curvature."""

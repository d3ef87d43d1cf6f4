"""Strategies that join several losses into one: by loss values, or by the Gram matrix of their gradients."""

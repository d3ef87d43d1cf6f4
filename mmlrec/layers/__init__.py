"""Building blocks of the networks. Import torch only.

Stacked tensors are [U, B, width]: member, row, feature. Layers of U members hold weights [U, i, o] and biases [U, o];
members that belong to heads are in head order, h = t * S + s.
"""
